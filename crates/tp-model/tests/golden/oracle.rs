//! Reads what `scripts/make_fixtures.py` stored: `transformers`' answers in float32.

use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensors};

/// Prompt lengths that every fixture holds.
pub const LENGTHS: [usize; 7] = [1, 2, 17, 64, 129, 333, 700];
/// Greedy tokens that follow each prompt.
pub const GREEDY: usize = 200;
/// Largest difference of a logits row from the oracle's, relative to the oracle's row.
pub const TOLERANCE: f64 = 1e-4;

/// Logits at one position of the sequence `prompt + greedy`.
pub struct LogitsRow {
    /// The position whose output this is: it predicts the token at `position + 1`.
    pub position: usize,
    /// One number for each token of the vocabulary.
    pub logits: Vec<f32>,
}

/// One prompt and what follows it.
pub struct Case {
    pub prompt: Vec<u32>,
    pub greedy: Vec<u32>,
    /// Within the prompt, its last position included.
    pub rows: Vec<LogitsRow>,
    /// Rows that chose some of the greedy tokens.
    pub step_rows: Vec<LogitsRow>,
}

/// Folder of a fixture.
pub fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures")
        .join(name)
}

/// All cases of a fixture, by rising length.
pub fn cases(name: &str) -> Vec<Case> {
    let path = folder(name).join("golden.safetensors");
    let bytes = std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let file = SafeTensors::deserialize(&bytes).expect("golden.safetensors is well-formed");
    LENGTHS.map(|length| case(&file, length)).into()
}

fn case(file: &SafeTensors<'_>, length: usize) -> Case {
    let prompt = ids(file, &format!("prompt.{length}"));
    let greedy = ids(file, &format!("greedy.{length}"));
    assert_eq!((prompt.len(), greedy.len()), (length, GREEDY));
    let rows = rows(file, "positions", "logits", length, 0);
    assert_eq!(rows.last().map(|row| row.position), Some(length - 1));
    let step_rows = self::rows(file, "steps", "step_logits", length, length - 1);
    assert!(!step_rows.is_empty());
    Case {
        prompt,
        greedy,
        rows,
        step_rows,
    }
}

fn rows(
    file: &SafeTensors<'_>,
    index: &str,
    values: &str,
    length: usize,
    offset: usize,
) -> Vec<LogitsRow> {
    let positions = ids(file, &format!("{index}.{length}"));
    let view = file.tensor(&format!("{values}.{length}")).expect("logits");
    assert_eq!(
        (view.dtype(), view.shape()[0]),
        (Dtype::F32, positions.len())
    );
    let logits: Vec<f32> = words(view.data()).map(f32::from_le_bytes).collect();
    positions
        .iter()
        .zip(logits.chunks_exact(view.shape()[1]))
        .map(|(&position, logits)| LogitsRow {
            position: offset + position as usize,
            logits: logits.to_vec(),
        })
        .collect()
}

fn ids(file: &SafeTensors<'_>, name: &str) -> Vec<u32> {
    let view = file.tensor(name).expect(name);
    assert_eq!(view.dtype(), Dtype::I32);
    words(view.data())
        .map(|word| u32::try_from(i32::from_le_bytes(word)).expect("token id"))
        .collect()
}

fn words(data: &[u8]) -> impl Iterator<Item = [u8; 4]> + '_ {
    data.chunks_exact(4).map(|b| [b[0], b[1], b[2], b[3]])
}

/// How far `got` is from `want`: the larger of the greatest difference relative to the greatest
/// magnitude, and the norm of the difference relative to the norm. NaN if anything is NaN.
pub fn relative_error(got: &[f32], want: &[f32]) -> f64 {
    assert_eq!(got.len(), want.len(), "size of a logits row");
    let (mut worst, mut largest, mut square, mut norm) = (0f64, 0f64, 0f64, 0f64);
    for (&a, &b) in got.iter().zip(want) {
        let (difference, b) = ((f64::from(a) - f64::from(b)).abs(), f64::from(b).abs());
        // `f64::max` would drop a NaN.
        worst = if difference > worst || difference.is_nan() {
            difference
        } else {
            worst
        };
        largest = largest.max(b);
        square += difference * difference;
        norm += b * b;
    }
    let (by_value, by_norm) = (worst / largest, (square / norm).sqrt());
    if by_value.is_nan() || by_norm.is_nan() {
        return f64::NAN;
    }
    by_value.max(by_norm)
}
