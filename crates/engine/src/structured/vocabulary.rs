//! The vocabulary as a trie of bytes.

use llguidance::toktrie::{INVALID_TOKEN, TokEnv, TokRxInfo, TokTrie, TokenId, TokenizerEnv};

use crate::tokenizer::Tokenizer;

/// The trie, as llguidance wants to see it.
struct Vocabulary(TokTrie);

impl TokenizerEnv for Vocabulary {
    fn tok_trie(&self) -> &TokTrie {
        &self.0
    }

    fn tokenize_bytes(&self, bytes: &[u8]) -> Vec<TokenId> {
        self.0.greedy_tokenize(bytes)
    }

    /// Text is split greedily here, not as the tokenizer would: no token may be forced on a model
    /// for that.
    fn tokenize_is_canonical(&self) -> bool {
        false
    }
}

/// The first `vocab_size` ids with the bytes they stand for. Ids without a token stand for nothing
/// and never come up; special tokens come up only where a grammar names them. `None` if the
/// tokenizer cannot tell what a token stands for.
pub(super) fn vocabulary(tokenizer: &Tokenizer, vocab_size: usize, eos: &[u32]) -> Option<TokEnv> {
    let word = |id: u32| {
        let bytes = tokenizer.exact_bytes(id)?;
        Some(match tokenizer.is_special(id) {
            true if bytes.is_empty() => bytes,
            true => [&[TokTrie::SPECIAL_TOKEN_MARKER], &bytes[..]].concat(),
            false => bytes,
        })
    };
    let words: Vec<Vec<u8>> = (0..vocab_size as u32).map(word).collect::<Option<_>>()?;
    let info = TokRxInfo::new(
        vocab_size as u32,
        eos.first().copied().unwrap_or(INVALID_TOKEN),
    );
    let mut trie = TokTrie::from(&info, &words);
    if !eos.is_empty() {
        trie = trie.with_eos_tokens(eos);
    }
    Some(std::sync::Arc::new(Vocabulary(trie)))
}
