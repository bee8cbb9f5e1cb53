//! Sequences by a dense key that stays valid while a step in flight names it.

use std::ops::{Index, IndexMut};

pub(crate) struct Arena<T> {
    entries: Vec<Option<T>>,
    vacant: Vec<u32>,
}

impl<T> Arena<T> {
    pub(crate) fn new() -> Self {
        Self {
            entries: Vec::new(),
            vacant: Vec::new(),
        }
    }

    pub(crate) fn insert(&mut self, value: T) -> u32 {
        match self.vacant.pop() {
            Some(key) => {
                self.entries[key as usize] = Some(value);
                key
            }
            None => {
                self.entries.push(Some(value));
                self.entries.len() as u32 - 1
            }
        }
    }

    pub(crate) fn remove(&mut self, key: u32) -> Option<T> {
        let value = self.entries.get_mut(key as usize)?.take();
        if value.is_some() {
            self.vacant.push(key);
        }
        value
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &T> {
        self.entries.iter().flatten()
    }
}

const GONE: &str = "a key is dropped from every list before its entry is removed";

impl<T> Index<u32> for Arena<T> {
    type Output = T;

    #[inline]
    fn index(&self, key: u32) -> &T {
        self.entries[key as usize].as_ref().expect(GONE)
    }
}

impl<T> IndexMut<u32> for Arena<T> {
    #[inline]
    fn index_mut(&mut self, key: u32) -> &mut T {
        self.entries[key as usize].as_mut().expect(GONE)
    }
}
