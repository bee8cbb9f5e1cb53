//! Token ids to text, one token at a time.
//!
//! A token is not a piece of text: it may hold a part of a character, and in tokenizers of the
//! sentencepiece kind its text depends on whether it comes first. Two ways lead through:
//!
//! * **Pieces.** Decoders whose tokens map to bytes one by one (byte-level BPE; sentencepiece with
//!   byte fallback, as in Llama 2 and Mistral). The bytes go through a streaming UTF-8 decoder
//!   that holds back at most three of them.
//! * **Window.** Any other decoder. A window of tokens is decoded with and without the new one, and
//!   the difference is the new text (the prefix and read offsets of vLLM and TGI).

use std::sync::Arc;

use tokenizers::Decoder;
use tokenizers::decoders::DecoderWrapper;

use crate::tokenizer::Tokenizer;

/// How to turn tokens into text, derived from the tokenizer's decoder.
#[derive(Clone, Debug)]
pub(crate) enum DecodePlan {
    Pieces {
        stages: Vec<Stage>,
        /// `(character, how many)` to take off the start of the text.
        strip: Option<(char, usize)>,
    },
    Window,
}

/// A step that works on one token by itself.
#[derive(Clone, Debug)]
pub(crate) enum Stage {
    /// `<0x41>` is the byte 0x41.
    ByteFallback,
    /// Characters that stand for bytes.
    ByteLevel,
    /// A string replacement.
    Replace(DecoderWrapper),
    /// `▁` to space, and to nothing in the first token.
    Metaspace(DecoderWrapper),
}

impl DecodePlan {
    pub(crate) fn of(tokenizer: &tokenizers::Tokenizer) -> Self {
        let single;
        let decoders = match tokenizer.get_decoder() {
            Some(DecoderWrapper::Sequence(sequence)) => sequence.get_decoders(),
            Some(decoder) => {
                single = [decoder.clone()];
                &single
            }
            None => return DecodePlan::Window,
        };
        let mut stages = Vec::new();
        let mut strip = None;
        let mut fused = false;
        for decoder in decoders {
            match decoder {
                // What follows Fuse or ByteLevel sees the text as a whole.
                DecoderWrapper::Strip(s) if fused && s.stop == 0 && strip.is_none() => {
                    strip = Some((s.content, s.start));
                }
                DecoderWrapper::Fuse(_) => fused = true,
                _ if fused => return DecodePlan::Window,
                DecoderWrapper::ByteFallback(_) => stages.push(Stage::ByteFallback),
                DecoderWrapper::ByteLevel(_) => {
                    stages.push(Stage::ByteLevel);
                    fused = true;
                }
                DecoderWrapper::Replace(_) => stages.push(Stage::Replace(decoder.clone())),
                DecoderWrapper::Metaspace(_) => stages.push(Stage::Metaspace(decoder.clone())),
                _ => return DecodePlan::Window,
            }
        }
        DecodePlan::Pieces { stages, strip }
    }

    /// The bytes of one token; `None` if this decoder cannot tell.
    pub(crate) fn piece(
        &self,
        tokenizer: &tokenizers::Tokenizer,
        id: u32,
        first: bool,
    ) -> Option<Vec<u8>> {
        let DecodePlan::Pieces { stages, .. } = self else {
            return None;
        };
        let Some(mut token) = tokenizer.id_to_token(id) else {
            return Some(Vec::new());
        };
        for stage in stages {
            match stage {
                Stage::ByteFallback => {
                    if let Some(byte) = fallback_byte(&token) {
                        return Some(vec![byte]);
                    }
                }
                Stage::ByteLevel => {
                    let bytes: Option<Vec<u8>> = token.chars().map(byte_of).collect();
                    return Some(bytes.unwrap_or_else(|| token.into_bytes()));
                }
                Stage::Replace(decoder) => token = last_of(decoder, vec![token])?,
                Stage::Metaspace(decoder) => {
                    let mut tokens = vec![token];
                    if !first {
                        tokens.insert(0, String::new());
                    }
                    token = last_of(decoder, tokens)?;
                }
            }
        }
        Some(token.into_bytes())
    }
}

fn last_of(decoder: &DecoderWrapper, tokens: Vec<String>) -> Option<String> {
    decoder.decode_chain(tokens).ok()?.pop()
}

fn fallback_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    (digits.len() == 2)
        .then(|| u8::from_str_radix(digits, 16).ok())
        .flatten()
}

/// The byte for which a character of a byte-level vocabulary stands: printable Latin-1 stands for
/// itself, and the other 68 bytes follow from U+0100 in order.
fn byte_of(c: char) -> Option<u8> {
    let printable = |b: u8| matches!(b, 0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF);
    match u32::from(c) {
        code @ 0..=0xFF => u8::try_from(code).ok().filter(|b| printable(*b)),
        code @ 0x100..=0x120 => u8::try_from(code - 0x100).ok(),
        code @ 0x121..=0x142 => u8::try_from(code - 0x121 + 0x7F).ok(),
        0x143 => Some(0xAD),
        _ => None,
    }
}

/// How many of the prompt's last tokens the window starts with: they decide about a leading space.
const CONTEXT: usize = 6;
/// A window whose text keeps ending in U+FFFD is given up after so many tokens: no character is
/// that long, so the text is broken, and decoding ever longer windows would cost quadratic time.
const LONGEST_WINDOW: usize = 32;

/// Turns the tokens of one sequence into text as they come. The pieces never split a character;
/// together with [`Detokenizer::flush`] they are the text of the whole.
#[derive(Clone, Debug)]
pub struct Detokenizer {
    tokenizer: Arc<Tokenizer>,
    skip_special: bool,
    state: State,
}

#[derive(Clone, Debug)]
enum State {
    Pieces {
        first: bool,
        /// What is left to take off the start.
        strip: Option<(char, usize)>,
        /// Beginning of a character.
        pending: Vec<u8>,
    },
    Window {
        ids: Vec<u32>,
        /// `ids[..read]` have been shown.
        read: usize,
        shown: String,
    },
}

impl Detokenizer {
    /// A detokenizer for what follows `prompt` (empty: the text stands by itself).
    pub fn new(tokenizer: Arc<Tokenizer>, prompt: &[u32], skip_special_tokens: bool) -> Self {
        let state = match &tokenizer.plan {
            DecodePlan::Pieces { strip, .. } => State::Pieces {
                first: true,
                strip: *strip,
                pending: Vec::new(),
            },
            DecodePlan::Window => State::Window {
                ids: Vec::new(),
                read: 0,
                shown: String::new(),
            },
        };
        let mut detokenizer = Detokenizer {
            tokenizer,
            skip_special: skip_special_tokens,
            state,
        };
        for &id in &prompt[prompt.len().saturating_sub(CONTEXT)..] {
            detokenizer.push(id);
        }
        detokenizer
    }

    /// Takes a token and returns the text that became final.
    pub fn push(&mut self, id: u32) -> String {
        let mut text = String::new();
        self.push_into(id, &mut text);
        text
    }

    /// Takes a token and appends the text that became final.
    pub(crate) fn push_into(&mut self, id: u32, out: &mut String) {
        if self.skip_special && self.tokenizer.is_special(id) {
            return;
        }
        match &mut self.state {
            State::Pieces {
                first,
                strip,
                pending,
            } => {
                let tokenizer = &self.tokenizer;
                let piece = tokenizer.piece(id, *first);
                // An id without a token leaves no trace in the text.
                *first = *first && tokenizer.inner.id_to_token(id).is_none();
                // Most pieces are whole characters.
                if pending.is_empty()
                    && strip.is_none()
                    && let Ok(text) = std::str::from_utf8(&piece)
                {
                    out.push_str(text);
                    return;
                }
                pending.extend_from_slice(&piece);
                out.push_str(&strip_start(take_text(pending), strip));
            }
            State::Window { ids, read, shown } => {
                ids.push(id);
                let text = self.tokenizer.decode(ids, false).unwrap_or_default();
                let settled = text.len() > shown.len() && !text.ends_with('\u{FFFD}');
                if !settled && ids.len() <= LONGEST_WINDOW {
                    return;
                }
                out.push_str(text.get(shown.len()..).unwrap_or_default());
                ids.drain(..*read);
                *read = ids.len();
                *shown = self.tokenizer.decode(ids, false).unwrap_or_default();
            }
        }
    }

    /// The text held back, once no token will follow: an incomplete character shows as U+FFFD.
    pub fn flush(&mut self) -> String {
        match &mut self.state {
            State::Pieces { strip, pending, .. } => {
                let text = String::from_utf8_lossy(pending).into_owned();
                pending.clear();
                strip_start(text, strip)
            }
            State::Window { ids, read, shown } => {
                let text = self.tokenizer.decode(ids, false).unwrap_or_default();
                let piece = text.get(shown.len()..).unwrap_or_default().to_string();
                *read = ids.len();
                *shown = text;
                piece
            }
        }
    }
}

/// Takes what is complete out of `bytes`, broken sequences as U+FFFD; leaves the beginning of a
/// character. The same as `String::from_utf8_lossy` on the whole stream.
fn take_text(bytes: &mut Vec<u8>) -> String {
    let mut text = String::new();
    let mut rest = bytes.as_slice();
    loop {
        match std::str::from_utf8(rest) {
            Ok(valid) => {
                text.push_str(valid);
                rest = &[];
                break;
            }
            Err(error) => {
                let (valid, after) = rest.split_at(error.valid_up_to());
                text.push_str(&String::from_utf8_lossy(valid));
                let Some(broken) = error.error_len() else {
                    rest = after;
                    break;
                };
                text.push('\u{FFFD}');
                rest = &after[broken..];
            }
        }
    }
    let done = bytes.len() - rest.len();
    bytes.drain(..done);
    text
}

/// Takes the characters still to be stripped off the front of the text.
fn strip_start(mut text: String, strip: &mut Option<(char, usize)>) -> String {
    if let Some((content, left)) = strip {
        let matching = text
            .chars()
            .take(*left)
            .take_while(|c| c == content)
            .count();
        text.drain(..matching * content.len_utf8());
        *left -= matching;
        if *left == 0 || !text.is_empty() {
            *strip = None;
        }
    }
    text
}
