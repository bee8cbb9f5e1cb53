//! Views of row-major weights in memory.

use std::ops::Range;

use tch::{Kind, Tensor};

/// A row-major matrix of float32, bfloat16 or float16 somewhere in memory, without gaps. Its
/// bytes need not be aligned.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a> {
    bytes: &'a [u8],
    kind: Kind,
    cols: usize,
}

impl<'a> Matrix<'a> {
    pub(crate) fn new(bytes: &'a [u8], kind: Kind, cols: usize) -> Self {
        Self { bytes, kind, cols }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.bytes.len() / self.row_bytes()
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Dtype of the elements.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The elements.
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// Some of the rows.
    pub(crate) fn slice(&self, rows: Range<usize>) -> Self {
        let width = self.row_bytes();
        Self {
            bytes: &self.bytes[rows.start * width..rows.end * width],
            ..*self
        }
    }

    /// A copy as a tensor on the CPU.
    pub(crate) fn to_tensor(self) -> Tensor {
        let shape = [self.rows() as i64, self.cols as i64];
        Tensor::from_data_size(self.bytes, &shape, self.kind)
    }

    fn row_bytes(&self) -> usize {
        self.cols * self.kind.elt_size_in_bytes()
    }
}
