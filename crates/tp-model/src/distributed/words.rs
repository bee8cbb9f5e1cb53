//! Messages as little-endian 32-bit words; lists after their length.

/// Writes a message.
#[derive(Default)]
pub(super) struct Writer(pub(super) Vec<u8>);

impl Writer {
    pub(super) fn put(&mut self, word: u32) {
        self.0.extend_from_slice(&word.to_le_bytes());
    }

    pub(super) fn put_u64(&mut self, number: u64) {
        self.0.extend_from_slice(&number.to_le_bytes());
    }

    pub(super) fn all<const N: usize>(&mut self, words: [u32; N]) {
        words.into_iter().for_each(|word| self.put(word));
    }

    pub(super) fn list<T>(&mut self, items: &[T], mut put: impl FnMut(&mut Self, &T)) {
        // A step has fewer of anything than there are 32-bit numbers.
        self.put(items.len() as u32);
        items.iter().for_each(|item| put(self, item));
    }

    /// Bytes after their number, padded to whole words.
    pub(super) fn bytes(&mut self, bytes: &[u8]) {
        self.put(bytes.len() as u32);
        self.0.extend_from_slice(bytes);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }
}

/// Reads a message; `None` where it is none.
pub(super) struct Reader<'a>(pub(super) &'a [u8]);

impl<'a> Reader<'a> {
    pub(super) fn get(&mut self) -> Option<u32> {
        let (word, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(u32::from_le_bytes(*word))
    }

    pub(super) fn get_u64(&mut self) -> Option<u64> {
        let [low, high] = self.all()?;
        Some(u64::from(low) | u64::from(high) << 32)
    }

    pub(super) fn all<const N: usize>(&mut self) -> Option<[u32; N]> {
        let mut words = [0; N];
        for word in &mut words {
            *word = self.get()?;
        }
        Some(words)
    }

    pub(super) fn list<T>(
        &mut self,
        mut get: impl FnMut(&mut Self) -> Option<T>,
    ) -> Option<Vec<T>> {
        let len = self.get()? as usize;
        // Every item is at least a word: a length that lies allocates nothing.
        if len > self.0.len() / 4 {
            return None;
        }
        (0..len).map(|_| get(self)).collect()
    }

    pub(super) fn bytes(&mut self) -> Option<&'a [u8]> {
        let len = self.get()? as usize;
        let padded = len.checked_next_multiple_of(4)?;
        let (bytes, rest) = self.0.split_at_checked(padded)?;
        self.0 = rest;
        Some(&bytes[..len])
    }
}
