//! The fuzzer's bytes in the place of a generator of random numbers: each draw takes one byte, so
//! that a mutated byte is another decision and leaves those before it as they are.

use rand::RngCore;

/// Zeros once the bytes are used up.
pub struct Bytes(std::vec::IntoIter<u8>);

impl Bytes {
    pub fn new(data: &[u8]) -> Self {
        Self(data.to_vec().into_iter())
    }
}

impl RngCore for Bytes {
    fn next_u32(&mut self) -> u32 {
        // The high bits decide about ranges and odds; the low ones fill up.
        u32::from(self.0.next().unwrap_or(0)) * 0x0101_0101
    }

    fn next_u64(&mut self) -> u64 {
        u64::from(self.next_u32()) * 0x1_0000_0001
    }

    fn fill_bytes(&mut self, dst: &mut [u8]) {
        dst.fill_with(|| self.0.next().unwrap_or(0));
    }
}
