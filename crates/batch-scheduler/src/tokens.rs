//! A sequence's tokens, the newest of them beside its other state.
//!
//! Appending to thousands of lists of their own touches as many pages of memory in every step.
//! Here that happens once in [`RECENT`] tokens.

use paged_kv::TokenId;

const RECENT: usize = 16;

#[repr(C)] // `Seq` counts on the order.
pub(crate) struct Tokens {
    len: u32,
    /// How many of the last are in `recent` and not in `list`.
    num_recent: u32,
    recent: [TokenId; RECENT],
    list: Vec<TokenId>,
}

impl Tokens {
    pub(crate) fn new(list: Vec<TokenId>) -> Self {
        Self {
            len: list.len() as u32,
            num_recent: 0,
            recent: [0; RECENT],
            list,
        }
    }

    #[inline]
    pub(crate) fn len(&self) -> u32 {
        self.len
    }

    #[inline]
    pub(crate) fn push(&mut self, token: TokenId) {
        if self.num_recent as usize == RECENT {
            self.whole();
        }
        self.recent[self.num_recent as usize] = token;
        self.num_recent += 1;
        self.len += 1;
    }

    /// All of them, in one list.
    #[inline(never)]
    pub(crate) fn whole(&mut self) -> &[TokenId] {
        let recent = std::mem::take(&mut self.num_recent) as usize;
        self.list.extend_from_slice(&self.recent[..recent]);
        &self.list
    }

    /// The first `keep`, in a list with room for `more`.
    pub(crate) fn first(&self, keep: u32, more: usize) -> Vec<TokenId> {
        let keep = keep as usize;
        let mut tokens = Vec::with_capacity(keep + more);
        let listed = keep.min(self.list.len());
        tokens.extend_from_slice(&self.list[..listed]);
        tokens.extend_from_slice(&self.recent[..keep - listed]);
        tokens
    }

    /// Keeps the first `keep`, and `tail` behind them.
    pub(crate) fn replace(&mut self, keep: u32, tail: &[TokenId]) {
        self.whole();
        self.list.truncate(keep as usize);
        self.list.extend_from_slice(tail);
        self.len = self.list.len() as u32;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_as_one_list() {
        let mut tokens = Tokens::new(vec![7; 3]);
        let mut expected = vec![7; 3];
        for i in 0..200u32 {
            match i % 23 {
                5 => assert_eq!(tokens.whole(), expected),
                11 => {
                    let keep = tokens.len() - i % 3;
                    tokens.replace(keep, &[i, i + 1]);
                    expected.truncate(keep as usize);
                    expected.extend([i, i + 1]);
                }
                _ => {
                    tokens.push(i);
                    expected.push(i);
                }
            }
            assert_eq!(tokens.len() as usize, expected.len());
            for keep in [0, tokens.len() / 2, tokens.len() - 1, tokens.len()] {
                assert_eq!(tokens.first(keep, 2), expected[..keep as usize]);
            }
        }
    }
}
