//! Checks of kernel arguments, as `cpu::check` has them for the CPU.

use tch::{Device, Kind, Tensor};

use crate::Error;

/// A tensor argument of a kernel.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Operand<'a> {
    pub(crate) op: &'static str,
    pub(crate) name: &'static str,
    pub(crate) tensor: &'a Tensor,
    pub(crate) device: Device,
}

/// Element types of weights and activations.
pub(crate) const HALVES: &[Kind] = &[Kind::BFloat16, Kind::Half];

impl Operand<'_> {
    /// A contiguous tensor on the device, of one of `kinds` and of the dimensions `expected`
    /// (`None`: any). Returns its dimensions.
    pub(crate) fn of<const N: usize>(
        self,
        kinds: &'static [Kind],
        expected: [Option<usize>; N],
    ) -> Result<[usize; N], Error> {
        let Operand {
            op,
            name: operand,
            tensor,
            device,
        } = self;
        if !tensor.defined() {
            return Err(self.argument("a tensor", "undefined"));
        }
        if tensor.device() != device {
            let (expected, found) = (device, tensor.device());
            return Err(Error::Device {
                op,
                operand,
                expected,
                found,
            });
        }
        if !kinds.contains(&tensor.kind()) {
            let found = tensor.kind();
            return Err(Error::Dtype {
                op,
                operand,
                expected: names(kinds),
                found,
            });
        }
        let shape = tensor.size();
        if tensor.is_sparse() || !tensor.is_contiguous() {
            return Err(Error::NotContiguous { op, operand, shape });
        }
        let fits = shape.len() == N
            && shape
                .iter()
                .zip(&expected)
                .all(|(&n, want)| want.is_none_or(|w| n == w as i64));
        if !fits {
            let dim = |d: &Option<usize>| d.map_or("_".into(), |d| d.to_string());
            let dims: Vec<String> = expected.iter().map(dim).collect();
            let expected = format!("[{}]", dims.join(", "));
            return Err(Error::Shape {
                op,
                operand,
                expected,
                found: shape,
            });
        }
        Ok(std::array::from_fn(|i| shape[i] as usize))
    }

    /// As [`of`](Self::of), and the kernel may go through it in 16-byte vectors: it starts at such
    /// an address, and its last dimension is a multiple of eight 2-byte elements.
    pub(crate) fn vectors<const N: usize>(
        self,
        kinds: &'static [Kind],
        expected: [Option<usize>; N],
    ) -> Result<[usize; N], Error> {
        let shape = self.of(kinds, expected)?;
        self.aligned()?;
        match shape.last() {
            Some(width) if width % 8 != 0 => Err(self.argument("a multiple of 8 columns", width)),
            _ => Ok(shape),
        }
    }

    /// Starts at a multiple of 16 bytes.
    pub(crate) fn aligned(self) -> Result<(), Error> {
        match self.tensor.data_ptr() as usize % 16 {
            0 => Ok(()),
            offset => {
                let found = format!("{offset} bytes past one");
                Err(self.argument("a tensor that starts at a multiple of 16 bytes", found))
            }
        }
    }

    /// An error about this argument's value.
    pub(crate) fn argument(&self, expected: impl Into<String>, found: impl ToString) -> Error {
        Error::Argument {
            op: self.op,
            operand: self.name,
            expected: expected.into(),
            found: found.to_string(),
        }
    }
}

fn names(kinds: &'static [Kind]) -> &'static str {
    match kinds {
        [Kind::BFloat16, Kind::Half] => "BFloat16 or Half",
        [Kind::Float] => "Float",
        [Kind::Int] => "Int",
        [Kind::Int64] => "Int64",
        _ => "another type",
    }
}
