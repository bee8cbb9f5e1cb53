//! What the sampling rank tells rank 0 of a step, if it is another: the step's output.

use batch_scheduler::{Sampled, SlotId, StepOutput};
use sampler::TokenLogprobs;

use super::words::{Reader, Writer};

type Output = StepOutput<TokenLogprobs>;

/// As little-endian 32-bit words; lists after their length.
pub(crate) fn encode(output: &Output) -> Vec<u8> {
    let mut words = Writer::default();
    words.put_u64(output.step);
    words.list(&output.samples, |w, sampled| {
        w.list(&sampled.tokens, |w, token| w.put(*token));
        w.list(&sampled.extras, put_logprobs);
        w.put(sampled.error.is_some().into());
        if let Some(error) = &sampled.error {
            w.bytes(error.as_bytes());
        }
    });
    words.list(&output.prompt_extras, |w, (slot, position, entries)| {
        w.all([slot.0, *position]);
        w.list(entries, put_logprobs);
    });
    words.0
}

/// What [`encode`] wrote.
pub(crate) fn decode(bytes: &[u8]) -> Result<Output, String> {
    let mut words = Reader(bytes);
    match (read(&mut words), words.0) {
        (Some(output), []) => Ok(output),
        _ => Err(format!(
            "an output of {} bytes that cannot be read: the sampling rank runs another version",
            bytes.len()
        )),
    }
}

fn put_logprobs(words: &mut Writer, entry: &TokenLogprobs) {
    words.all([entry.token, entry.logprob.to_bits(), entry.rank]);
    words.list(&entry.top, |w, (token, logprob)| {
        w.all([*token, logprob.to_bits()]);
    });
}

fn get_logprobs(words: &mut Reader<'_>) -> Option<TokenLogprobs> {
    let [token, logprob, rank] = words.all()?;
    Some(TokenLogprobs {
        token,
        logprob: f32::from_bits(logprob),
        rank,
        top: words.list(|w| {
            let [token, logprob] = w.all()?;
            Some((token, f32::from_bits(logprob)))
        })?,
    })
}

fn read(words: &mut Reader<'_>) -> Option<Output> {
    Some(StepOutput {
        step: words.get_u64()?,
        samples: words.list(|w| {
            Some(Sampled {
                tokens: w.list(Reader::get)?.into(),
                extras: w.list(get_logprobs)?,
                error: match w.get()? {
                    0 => None,
                    _ => Some(String::from_utf8_lossy(w.bytes()?).into_owned()),
                },
            })
        })?,
        prompt_extras: words.list(|w| {
            let [slot, position] = w.all()?;
            Some((SlotId(slot), position, w.list(get_logprobs)?))
        })?,
    })
}

#[cfg(test)]
mod tests {
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    use super::*;

    fn logprobs(rng: &mut StdRng) -> Vec<TokenLogprobs> {
        let entry = |rng: &mut StdRng| TokenLogprobs {
            token: rng.random(),
            logprob: f32::from_bits(rng.random()),
            rank: rng.random(),
            top: (0..rng.random_range(0..4))
                .map(|_| (rng.random(), f32::NEG_INFINITY))
                .collect(),
        };
        (0..rng.random_range(0..3)).map(|_| entry(rng)).collect()
    }

    #[test]
    fn what_is_read_is_what_was_written() {
        let mut rng = StdRng::seed_from_u64(6);
        for _ in 0..500 {
            let output = Output {
                step: rng.random(),
                samples: (0..rng.random_range(0..6))
                    .map(|_| Sampled {
                        tokens: (0..rng.random_range(0..3)).map(|_| rng.random()).collect(),
                        extras: logprobs(&mut rng),
                        error: rng
                            .random_bool(0.3)
                            .then(|| "é".repeat(rng.random_range(0..9))),
                    })
                    .collect(),
                prompt_extras: (0..rng.random_range(0..3))
                    .map(|_| (SlotId(rng.random()), rng.random(), logprobs(&mut rng)))
                    .collect(),
            };
            let bytes = encode(&output);
            let read = decode(&bytes).unwrap();
            // Bits, because NaN is not equal to itself.
            assert_eq!(encode(&read), bytes);
            assert_eq!(format!("{read:?}"), format!("{output:?}"));
            let cut = rng.random_range(0..bytes.len());
            assert!(decode(&bytes[..cut]).is_err());
            assert!(decode(&[&bytes[..], &[0; 4]].concat()).is_err());
            let mut broken = bytes;
            let at = rng.random_range(0..broken.len());
            broken[at] ^= rng.random_range(1..=255u8);
            let _ = decode(&broken);
        }
    }
}
