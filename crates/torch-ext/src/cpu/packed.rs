use std::ffi::c_void;
use std::ops::Range;
use std::ptr;

use memmap2::{MmapMut, MmapOptions};
use tch::Tensor;

use super::check::{empty, operand};
use super::{Dtype, ffi, threads, threads_for};
use crate::Error;

/// Rows of a panel: `PANEL` in `csrc/cpu/simd.h`.
const PANEL: usize = 16;
const HUGE_PAGE: usize = 2 << 20;

/// An `N` x `K` weight matrix in the layout that the products stream: panels of 16 rows,
/// `[N/16][K][16]`, zero padded, in memory that asks for huge pages.
///
/// Row `n` of the matrix is output column `n` of `x W^T`, as in a checkpoint's `[out, in]`. Fill
/// it with [`pack_rows`](Self::pack_rows); several matrices may be stacked along `N` (q, k and v;
/// gate and up).
#[derive(Debug)]
pub struct PackedWeight {
    n: usize,
    k: usize,
    dtype: Dtype,
    map: MmapMut,
    /// Where the first panel starts in `map`: at a multiple of the huge page.
    start: usize,
}

impl PackedWeight {
    /// A matrix of zeros. Memory is committed as rows are packed.
    pub fn zeros(n: usize, k: usize, dtype: Dtype) -> Result<Self, Error> {
        const OP: &str = "PackedWeight::zeros";
        // Room for alignment and for prefetches past the end: no overflow from here on.
        let bytes = n
            .div_ceil(PANEL)
            .checked_mul(k.checked_next_multiple_of(2).unwrap_or(usize::MAX))
            .and_then(|b| b.checked_mul(PANEL * dtype.size()))
            .filter(|&b| n > 0 && k > 0 && b <= isize::MAX as usize - 2 * HUGE_PAGE)
            .ok_or_else(|| Error::Argument {
                op: OP,
                operand: "n, k",
                expected: "positive, and a size that fits the address space".into(),
                found: format!("{n}, {k}"),
            })?;
        // Small matrices (norms of test models) do without huge pages.
        let slack = if bytes >= HUGE_PAGE { HUGE_PAGE } else { 0 };
        let memory = |source| Error::Memory { bytes, source };
        let map = MmapOptions::new()
            .len(bytes + slack)
            .map_anon()
            .map_err(memory)?;
        let start = if slack > 0 {
            map.as_ptr().align_offset(HUGE_PAGE)
        } else {
            0
        };
        // Advice only: without huge pages everything still works.
        #[cfg(target_os = "linux")]
        if slack > 0 {
            let _ = map.advise(memmap2::Advice::HugePage);
        }
        Ok(Self {
            n,
            k,
            dtype,
            map,
            start,
        })
    }

    /// Packs a tensor `[N, K]` of float32, bfloat16 or float16, converting it to `dtype`.
    pub fn from_tensor(tensor: &Tensor, dtype: Dtype) -> Result<Self, Error> {
        let ([n, k], data, source) =
            operand("PackedWeight::from_tensor", "tensor", tensor).float([None, None])?;
        let mut packed = Self::zeros(n, k, dtype)?;
        // SAFETY: a contiguous CPU tensor of n * k elements, borrowed during the call.
        let bytes = unsafe { std::slice::from_raw_parts(data.cast(), n * k * source.size()) };
        packed.pack_rows(0, bytes, source)?;
        Ok(packed)
    }

    /// Output features.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Input features.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Type of the stored elements.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Bytes that one product reads.
    pub fn bytes(&self) -> usize {
        self.n.div_ceil(PANEL) * self.k.next_multiple_of(2) * PANEL * self.dtype.size()
    }

    /// Fills the rows from `row` on from row-major `[rows, K]` memory of type `source` (bytes in
    /// this machine's order, any alignment), rounding to nearest, ties to even.
    pub fn pack_rows(&mut self, row: usize, bytes: &[u8], source: Dtype) -> Result<(), Error> {
        self.pack_columns(row, bytes, source, self.k, 0..self.k)
    }

    /// As [`pack_rows`](Self::pack_rows), from rows of `source_cols` elements of which only
    /// `columns` (as many as `K`) are taken: a shard of a row-parallel layer.
    pub fn pack_columns(
        &mut self,
        row: usize,
        bytes: &[u8],
        source: Dtype,
        source_cols: usize,
        columns: Range<usize>,
    ) -> Result<(), Error> {
        const OP: &str = "PackedWeight::pack";
        let wrong = |operand, expected: String, found: String| {
            Err(Error::Argument {
                op: OP,
                operand,
                expected,
                found,
            })
        };
        let sane = source_cols <= isize::MAX as usize / source.size();
        if columns.len() != self.k || columns.end > source_cols || !sane {
            let expected = format!("{} columns within 0..{source_cols}", self.k);
            return wrong("columns", expected, format!("{columns:?}"));
        }
        let row_bytes = source_cols * source.size();
        if !bytes.len().is_multiple_of(row_bytes) {
            let expected = format!("a multiple of {row_bytes} bytes (one row of {source_cols})");
            return wrong("bytes", expected, format!("{} bytes", bytes.len()));
        }
        let rows = bytes.len() / row_bytes;
        if row > self.n || rows > self.n - row {
            let expected = format!(
                "at most {} rows from row {row} on",
                self.n.saturating_sub(row)
            );
            return wrong("bytes", expected, format!("{rows} rows"));
        }
        if rows == 0 {
            return Ok(());
        }
        let args = ffi::Pack {
            panels: self.panels_mut(),
            dtype: self.dtype as i32,
            k: self.k,
            row,
            rows,
            src: bytes[columns.start * source.size()..].as_ptr().cast(),
            src_dtype: source as i32,
            src_stride: source_cols,
            threads: threads(),
        };
        // SAFETY: the source holds `rows` rows of `source_cols` elements and the columns lie
        // within; the destination rows lie within the matrix, which is borrowed mutably.
        unsafe { (ffi::kernels().pack)(&args) };
        Ok(())
    }

    /// `x W^T + bias`: `x` is float32 `[M, K]`, `bias` float32 `[N]`; the result `[M, N]`.
    pub fn linear(&self, x: &Tensor, bias: Option<&Tensor>) -> Result<Tensor, Error> {
        const OP: &str = "linear";
        let ([m, _], x) = operand(OP, "x", x).f32([None, Some(self.k)])?;
        let bias = self.bias(OP, bias)?;
        let y = empty(&[m, self.n]);
        self.product(x, m, bias, y.data_ptr().cast(), false);
        Ok(y)
    }

    /// `residual += x W^T + bias`, with `residual` float32 `[M, N]`. The sum over `K` is completed
    /// before it is added, so the result is that of [`linear`](Self::linear) and an addition.
    pub fn linear_add(
        &self,
        x: &Tensor,
        bias: Option<&Tensor>,
        residual: &mut Tensor,
    ) -> Result<(), Error> {
        const OP: &str = "linear_add";
        let ([m, _], x) = operand(OP, "x", x).f32([None, Some(self.k)])?;
        let bias = self.bias(OP, bias)?;
        let (_, y) = operand(OP, "residual", residual).f32([Some(m), Some(self.n)])?;
        self.product(x, m, bias, y, true);
        Ok(())
    }

    fn bias(&self, op: &'static str, bias: Option<&Tensor>) -> Result<*const f32, Error> {
        bias.map_or(Ok(ptr::null()), |b| {
            Ok(operand(op, "bias", b).f32([Some(self.n)])?.1.cast_const())
        })
    }

    fn product(&self, x: *const f32, m: usize, bias: *const f32, y: *mut f32, accumulate: bool) {
        if m == 0 {
            return;
        }
        let args = ffi::Linear {
            panels: self.panels(),
            dtype: self.dtype as i32,
            n: self.n,
            k: self.k,
            x,
            m,
            bias,
            y,
            accumulate: i32::from(accumulate),
            threads: threads_for(self.n * self.k * self.dtype.size(), m * self.n * self.k),
        };
        // SAFETY: the callers checked x [m, k], bias [n] or null, and y [m, n].
        unsafe { (ffi::kernels().linear)(&args) };
    }

    /// Rows `ids` (int32 or int64 `[T]`) of the matrix as float32 `[T, K]`: the token embedding,
    /// from the same copy that a tied output layer multiplies with.
    pub fn embedding(&self, ids: &Tensor) -> Result<Tensor, Error> {
        let ids_of = operand("embedding", "ids", ids);
        let ids = ids_of.indices(None)?;
        ids_of.within(&ids, 0..self.n as i64)?;
        Ok(self.gather(&ids))
    }

    /// The whole matrix as float32 `[N, K]`.
    pub fn to_tensor(&self) -> Tensor {
        self.gather(&(0..self.n as i64).collect::<Vec<_>>())
    }

    fn gather(&self, ids: &[i64]) -> Tensor {
        let y = empty(&[ids.len(), self.k]);
        let args = ffi::Embedding {
            panels: self.panels(),
            dtype: self.dtype as i32,
            k: self.k,
            ids: ids.as_ptr(),
            t: ids.len(),
            y: y.data_ptr().cast(),
            threads: threads_for(4 * ids.len() * self.k, 0),
        };
        // SAFETY: every id is a row of the matrix, and y has room for as many rows as ids.
        unsafe { (ffi::kernels().embedding)(&args) };
        y
    }

    fn panels(&self) -> *const c_void {
        self.map[self.start..].as_ptr().cast()
    }

    fn panels_mut(&mut self) -> *mut c_void {
        self.map[self.start..].as_mut_ptr().cast()
    }
}
