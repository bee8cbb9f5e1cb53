//! Stop strings in a stream of text that arrives in pieces.

/// Finds stop strings across the borders of pieces, and holds back the text that may still turn
/// out to be the beginning of one.
///
/// The match that counts is the one that *ends* first; of several that end together, the longest.
/// This makes the result independent of how the text is cut into pieces.
#[derive(Clone, Debug)]
pub struct StopChecker {
    stops: Vec<String>,
    include_stop: bool,
    /// The longest end of the text that is a proper beginning of some stop string.
    held: String,
}

/// What a piece of text led to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StopUpdate {
    /// Text that may be shown now.
    pub text: String,
    /// The stop string that was completed, as its index in the list; nothing may follow.
    pub matched: Option<usize>,
}

impl StopChecker {
    /// A checker for `stops`, none of which is empty. With `include_stop` the matched string
    /// stays in the text.
    pub fn new(stops: &[String], include_stop: bool) -> Self {
        StopChecker {
            stops: stops.iter().filter(|s| !s.is_empty()).cloned().collect(),
            include_stop,
            held: String::new(),
        }
    }

    /// Whether there is nothing to look for.
    pub(crate) fn is_empty(&self) -> bool {
        self.stops.is_empty()
    }

    /// The stop string of index `matched`.
    pub fn stop_string(&self, matched: usize) -> &str {
        &self.stops[matched]
    }

    /// Takes the next piece. With `armed` false (fewer than `min_tokens` tokens so far) no match
    /// may end in this piece, though one may begin in it.
    pub fn push(&mut self, piece: &str, armed: bool) -> StopUpdate {
        if self.stops.is_empty() {
            return StopUpdate {
                text: piece.to_string(),
                matched: None,
            };
        }
        let old = self.held.len();
        let mut window = std::mem::take(&mut self.held);
        window.push_str(piece);
        if armed && let Some((start, stop)) = self.first_match(&window, old) {
            let end = start + self.stops[stop].len();
            window.truncate(if self.include_stop { end } else { start });
            return StopUpdate {
                text: window,
                matched: Some(stop),
            };
        }
        let keep_from = self.beginning_of_a_stop(&window);
        self.held = window.split_off(keep_from);
        StopUpdate {
            text: window,
            matched: None,
        }
    }

    /// The text held back, once nothing more will come.
    pub fn flush(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// `(start, stop)` of the match with the least end beyond `old`; then the least start.
    fn first_match(&self, window: &str, old: usize) -> Option<(usize, usize)> {
        let mut best: Option<(usize, usize, usize)> = None;
        for (index, stop) in self.stops.iter().enumerate() {
            // The earliest start whose end lies beyond `old`, on a character border.
            let mut from = (old + 1).saturating_sub(stop.len());
            while !window.is_char_boundary(from) {
                from += 1;
            }
            if let Some(at) = window[from..].find(stop.as_str()) {
                let start = from + at;
                let key = (start + stop.len(), start, index);
                if best.is_none_or(|b| key < b) {
                    best = Some(key);
                }
            }
        }
        best.map(|(_, start, index)| (start, index))
    }

    /// Where the longest end of `window` starts that is a proper beginning of a stop string.
    fn beginning_of_a_stop(&self, window: &str) -> usize {
        let longest = self.stops.iter().map(String::len).max().unwrap_or(0);
        let mut from = window.len().saturating_sub(longest.saturating_sub(1));
        while from < window.len() {
            if window.is_char_boundary(from) {
                let tail = &window[from..];
                if self
                    .stops
                    .iter()
                    .any(|stop| stop.len() > tail.len() && stop.starts_with(tail))
                {
                    return from;
                }
            }
            from += 1;
        }
        window.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{Rng, SeedableRng, rngs::StdRng};

    /// The definition, read off the whole text: the least end beyond `unarmed` bytes.
    fn oracle(text: &str, stops: &[String], include: bool, unarmed: usize) -> (String, bool) {
        for end in unarmed + 1..=text.len() {
            let at_end = stops
                .iter()
                .filter(|stop| text.is_char_boundary(end) && text[..end].ends_with(stop.as_str()))
                .max_by_key(|stop| stop.len());
            if let Some(stop) = at_end {
                let cut = if include { end } else { end - stop.len() };
                return (text[..cut].to_string(), true);
            }
        }
        (text.to_string(), false)
    }

    fn random_text(rng: &mut StdRng, max: usize) -> String {
        let letters = ['a', 'b', 'é', '漢', '🙂'];
        (0..rng.random_range(1..=max))
            .map(|_| letters[rng.random_range(0..letters.len())])
            .collect()
    }

    #[test]
    fn any_split_and_any_stops_equal_truncating_the_whole_text() {
        let mut rng = StdRng::seed_from_u64(7);
        let mut stopped = 0;
        for round in 0..20_000 {
            let pieces: Vec<String> = (0..rng.random_range(1..12))
                .map(|_| random_text(&mut rng, 3))
                .collect();
            let stops: Vec<String> = (0..rng.random_range(0..4))
                .map(|_| random_text(&mut rng, 4))
                .collect();
            let include = rng.random();
            let min_pieces = rng.random_range(0..4);
            let unarmed: usize = pieces.iter().take(min_pieces).map(String::len).sum();
            let mut checker = StopChecker::new(&stops, include);
            let mut text = String::new();
            let mut matched = false;
            for (at, piece) in pieces.iter().enumerate() {
                let update = checker.push(piece, at >= min_pieces);
                text.push_str(&update.text);
                if update.matched.is_some() {
                    matched = true;
                    break;
                }
            }
            if !matched {
                text.push_str(&checker.flush());
            }
            let whole = pieces.concat();
            assert_eq!(
                (text, matched),
                oracle(&whole, &stops, include, unarmed),
                "round {round}: {pieces:?}, stops {stops:?}, include {include}, min {min_pieces}"
            );
            stopped += usize::from(matched);
        }
        assert!(
            (2_000..18_000).contains(&stopped),
            "{stopped} rounds stopped"
        );
    }

    #[test]
    fn text_that_cannot_begin_a_stop_is_shown_at_once() {
        let mut checker = StopChecker::new(&["\n\nUser:".to_string()], false);
        assert_eq!(checker.push("Hello", true).text, "Hello");
        assert_eq!(checker.push("!\n", true).text, "!");
        assert_eq!(checker.push("\nUs", true).text, "");
        assert_eq!(checker.push("ed", true).text, "\n\nUsed");
        assert_eq!(checker.push("\n\nUser: x", true).matched, Some(0));
        assert_eq!(checker.stop_string(0), "\n\nUser:");
    }
}
