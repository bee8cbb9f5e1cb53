//! Sizes as people and vLLM's flags write them.

use std::ops::RangeInclusive;

use rand::{Rng, rngs::StdRng};

/// Parses `4096`, `4k` (4,000), `4K` (4,096), `25.6k`, and so on up to `T`: lower case counts in
/// thousands, upper case in 1,024s, as vLLM's flags do.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let (number, unit) = match text.char_indices().last() {
        Some((at, 'k')) => (&text[..at], 1_000u64),
        Some((at, 'm')) => (&text[..at], 1_000_000),
        Some((at, 'g')) => (&text[..at], 1_000_000_000),
        Some((at, 't')) => (&text[..at], 1_000_000_000_000),
        Some((at, 'K')) => (&text[..at], 1 << 10),
        Some((at, 'M')) => (&text[..at], 1 << 20),
        Some((at, 'G')) => (&text[..at], 1 << 30),
        Some((at, 'T')) => (&text[..at], 1 << 40),
        _ => (text, 1),
    };
    let error = || format!("'{text}' is not a size such as 4096, 4k (4,000), 4K (4,096) or 1.5G");
    if let Ok(whole) = number.parse::<u64>() {
        return whole.checked_mul(unit).ok_or_else(error);
    }
    let value = number.parse::<f64>().map_err(|_| error())? * unit as f64;
    if unit == 1 || !(0.0..9e18).contains(&value) || value.fract() != 0.0 {
        return Err(error());
    }
    Ok(value as u64)
}

/// Parses a size that must not be 0.
pub fn parse_count(text: &str) -> Result<usize, String> {
    match parse_size(text)? {
        0 => Err("must be at least 1".into()),
        n => usize::try_from(n).map_err(|e| e.to_string()),
    }
}

/// A length, or a range of lengths to draw from uniformly.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lengths(RangeInclusive<usize>);

impl Lengths {
    /// Parses `512` or `100..1024` (both ends included).
    pub fn parse(text: &str) -> Result<Self, String> {
        let number = |t: &str| match t.parse::<usize>() {
            Ok(n) if n > 0 => Ok(n),
            _ => Err(format!("'{text}' is not a length such as 512 or 100..1024")),
        };
        let range = match text.split_once("..") {
            None => number(text)?..=number(text)?,
            Some((low, high)) => number(low)?..=number(high)?,
        };
        if range.is_empty() {
            return Err(format!("'{text}' is an empty range"));
        }
        Ok(Self(range))
    }

    /// Draws a length.
    pub fn draw(&self, rng: &mut StdRng) -> usize {
        rng.random_range(self.0.clone())
    }

    /// The longest.
    pub fn max(&self) -> usize {
        *self.0.end()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (text, expected) in [
            ("0", 0),
            ("4096", 4096),
            ("1k", 1000),
            ("1K", 1024),
            ("25.6k", 25_600),
            ("1.5K", 1536),
            ("4G", 4 << 30),
        ] {
            assert_eq!(parse_size(text), Ok(expected), "{text}");
        }
        for text in [
            "",
            "k",
            "-1",
            "1.5",
            "1kk",
            "nan",
            "infk",
            "99999999999999999999",
            "99999999T",
            "1.0001k",
        ] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn lengths() {
        use rand::SeedableRng;
        let mut rng = StdRng::seed_from_u64(0);
        assert_eq!(Lengths::parse("5").unwrap().draw(&mut rng), 5);
        let range = Lengths::parse("2..4").unwrap();
        let mut seen = [0; 6];
        (0..200).for_each(|_| seen[range.draw(&mut rng)] += 1);
        assert!(seen[2] > 0 && seen[3] > 0 && seen[4] > 0 && seen[2] + seen[3] + seen[4] == 200);
        assert_eq!(range.max(), 4);
        for text in ["", "0", "a", "1..", "4..2", "0..3", "1..2..3"] {
            assert!(Lengths::parse(text).is_err(), "{text}");
        }
    }
}
