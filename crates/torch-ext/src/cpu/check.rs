//! From a tensor to a pointer: everything that is checked once on the way.

use std::ffi::c_void;

use tch::{Device, Kind, Tensor};

use crate::Error;

/// One argument of a kernel.
#[derive(Clone, Copy)]
pub(super) struct Operand<'a> {
    pub op: &'static str,
    pub name: &'static str,
    pub tensor: &'a Tensor,
}

/// Shorthand that keeps the call sites on one line.
pub(super) fn operand<'a>(op: &'static str, name: &'static str, tensor: &'a Tensor) -> Operand<'a> {
    Operand { op, name, tensor }
}

impl Operand<'_> {
    /// A contiguous CPU tensor of one of `kinds`; its shape.
    fn checked(self, kinds: &[Kind], expected: &'static str) -> Result<Vec<i64>, Error> {
        let Operand {
            op,
            name: operand,
            tensor,
        } = self;
        if !tensor.defined() {
            let (expected, found) = ("a tensor".into(), "undefined".into());
            return Err(Error::Argument {
                op,
                operand,
                expected,
                found,
            });
        }
        if tensor.device() != Device::Cpu {
            return Err(Error::Device {
                op,
                operand,
                expected: Device::Cpu,
                found: tensor.device(),
            });
        }
        if !kinds.contains(&tensor.kind()) {
            return Err(Error::Dtype {
                op,
                operand,
                expected,
                found: tensor.kind(),
            });
        }
        let shape = tensor.size();
        if tensor.is_sparse() || !tensor.is_contiguous() {
            return Err(Error::NotContiguous { op, operand, shape });
        }
        Ok(shape)
    }

    fn shaped<const N: usize>(
        self,
        shape: Vec<i64>,
        expected: [Option<usize>; N],
    ) -> Result<[usize; N], Error> {
        let fits = shape.len() == N
            && shape
                .iter()
                .zip(&expected)
                .all(|(&n, want)| want.is_none_or(|w| n == w as i64));
        if !fits {
            let dims: Vec<String> = expected
                .iter()
                .map(|d| d.map_or("_".into(), |d| d.to_string()))
                .collect();
            let expected = format!("[{}]", dims.join(", "));
            return Err(Error::Shape {
                op: self.op,
                operand: self.name,
                expected,
                found: shape,
            });
        }
        Ok(std::array::from_fn(|i| shape[i] as usize))
    }

    /// A float32 tensor whose dimensions are `expected` (`None`: any).
    pub fn f32<const N: usize>(
        self,
        expected: [Option<usize>; N],
    ) -> Result<([usize; N], *mut f32), Error> {
        let shape = self.checked(&[Kind::Float], "Float")?;
        let shape = self.shaped(shape, expected)?;
        Ok((shape, self.tensor.data_ptr().cast()))
    }

    /// A float32, bfloat16 or float16 tensor.
    pub fn float<const N: usize>(
        self,
        expected: [Option<usize>; N],
    ) -> Result<([usize; N], *mut c_void, super::Dtype), Error> {
        let kinds = [Kind::Float, Kind::BFloat16, Kind::Half];
        let shape = self.checked(&kinds, "Float, BFloat16 or Half")?;
        let shape = self.shaped(shape, expected)?;
        let dtype = super::Dtype::from_kind(self.tensor.kind()).expect("one of the kinds above");
        Ok((shape, self.tensor.data_ptr(), dtype))
    }

    /// The values of a list of int32 or int64 (`None`: any length).
    pub fn indices(self, len: Option<usize>) -> Result<Vec<i64>, Error> {
        let shape = self.checked(&[Kind::Int, Kind::Int64], "Int or Int64")?;
        let [len] = self.shaped(shape, [len])?;
        let data = self.tensor.data_ptr();
        if len == 0 {
            return Ok(Vec::new());
        }
        Ok(match self.tensor.kind() {
            // SAFETY: a contiguous, defined CPU tensor of `len` int32 elements was checked above.
            Kind::Int => unsafe { std::slice::from_raw_parts(data.cast::<i32>(), len) }
                .iter()
                .map(|&i| i64::from(i))
                .collect(),
            // SAFETY: as above, of int64 elements.
            _ => unsafe { std::slice::from_raw_parts(data.cast::<i64>(), len) }.to_vec(),
        })
    }

    /// A matrix of int32, borrowed.
    pub fn int_matrix(&self, expected: [Option<usize>; 2]) -> Result<([usize; 2], &[i32]), Error> {
        let shape = self.checked(&[Kind::Int], "Int")?;
        let shape = self.shaped(shape, expected)?;
        let len = shape[0] * shape[1];
        if len == 0 {
            return Ok((shape, &[]));
        }
        // SAFETY: a contiguous, defined CPU tensor of `len` int32 elements was checked above, and
        // it is borrowed for as long as the slice.
        Ok((shape, unsafe {
            std::slice::from_raw_parts(self.tensor.data_ptr().cast(), len)
        }))
    }

    /// Checks that the values of an index list lie in `range`.
    pub fn within(&self, values: &[i64], range: std::ops::Range<i64>) -> Result<(), Error> {
        match values.iter().position(|v| !range.contains(v)) {
            None => Ok(()),
            Some(at) => Err(Error::Index {
                op: self.op,
                operand: self.name,
                at,
                expected: format!("{}..{}", range.start, range.end),
                found: values[at],
            }),
        }
    }

    /// An error about this argument's value.
    pub fn argument(&self, expected: impl Into<String>, found: impl ToString) -> Error {
        let (expected, found) = (expected.into(), found.to_string());
        Error::Argument {
            op: self.op,
            operand: self.name,
            expected,
            found,
        }
    }
}

/// A positive, finite epsilon or scale.
pub(super) fn finite(op: &'static str, operand: &'static str, value: f64) -> Result<f32, Error> {
    if value.is_finite() && value >= 0.0 {
        return Ok(value as f32);
    }
    let (expected, found) = ("finite and not negative".into(), value.to_string());
    Err(Error::Argument {
        op,
        operand,
        expected,
        found,
    })
}

/// Fresh float32 memory for a result.
pub(super) fn empty(shape: &[usize]) -> Tensor {
    let shape: Vec<i64> = shape.iter().map(|&n| n as i64).collect();
    Tensor::empty(&shape[..], (Kind::Float, Device::Cpu))
}
