//! `silu(gate) * up` of many rows as one kernel, on Hopper.

use tch::Tensor;

use super::check::{HALVES, Operand};
use super::compile::Source;
use super::kernels::{Arg, Kernels, Launch};
use super::rope::{element, same_kind};
use super::tensor_map::TensorMap;
use crate::Error;

pub(crate) static SOURCE: Source = Source {
    name: "gated_product",
    text: concat!(
        include_str!("../../csrc/cuda/hopper.cuh"),
        include_str!("../../csrc/cuda/gated_product.cu")
    ),
    variants: &[&["T_BF16=1"], &["T_HALF=1"]],
};

/// TOKENS, COLUMNS, STAGES and CLUSTER in the source.
const TOKENS: usize = 128;
const COLUMNS: usize = 256;
const STAGES: usize = 4;
const CLUSTER: usize = 2;
const THREADS: u32 = 384;
/// Dynamic shared memory, in bytes: the ring, 16 rows of results for each of eight warps, and what it takes to begin at a
/// multiple of 1024.
const SHARED: usize = STAGES * (TOKENS + COLUMNS) * 128 + 8 * 16 * COLUMNS + 1024;
/// Below, cuBLAS and a kernel for the SiLU were measured to be as fast.
const FEWEST_ROWS: usize = 2048;

/// Tiles of a cluster for a weight of `n` rows, and how many clusters run at the same time.
fn tiles(tokens: usize, n: usize, num_sms: usize) -> (usize, usize) {
    let tiles = tokens.div_ceil(CLUSTER * TOKENS) * n.div_ceil(COLUMNS);
    (tiles, (num_sms / CLUSTER).max(1))
}

fn wins(tokens: usize, n: usize, num_sms: usize) -> bool {
    let (tiles, clusters) = tiles(tokens, n, num_sms);
    let rounds = tiles.div_ceil(clusters);
    // The last round, where it is not full, leaves at most a fifth of the whole unused.
    tokens >= FEWEST_ROWS && 10 * tiles >= 8 * rounds * clusters
}

impl Kernels {
    /// Whether [`gated_product`](Self::gated_product) is faster than a product and
    /// [`silu_mul`](Self::silu_mul) for so many rows and a weight of `[out_features, in_features]`.
    pub fn prefers_gated_product(
        &self,
        rows: usize,
        out_features: usize,
        in_features: usize,
    ) -> bool {
        self.capability() == (9, 0)
            && out_features.is_multiple_of(16)
            && in_features > 0
            && in_features.is_multiple_of(8)
            && wins(rows, out_features, self.num_sms())
    }

    /// `silu(gate) * up` (`[rows, n / 2]`) of `x w^T`: `x` `[rows, k]`, `w` `[n, k]` with the gate's
    /// rows first, both bfloat16 or both float16, `n` a multiple of 16 and `k` of 8. Compute
    /// capability 9.0 alone. Sums are float32; rounds where the product and
    /// [`silu_mul`](Self::silu_mul) would. A row's result does not depend on the other rows.
    pub fn gated_product(&self, x: &Tensor, w: &Tensor) -> Result<Tensor, Error> {
        let operand = |name, tensor| Operand {
            op: "gated_product",
            name,
            tensor,
            device: self.device(),
        };
        let [n, k] = operand("w", w).vectors(HALVES, [None, None])?;
        let [tokens, _] = operand("x", x).vectors(same_kind(w.kind()), [None, Some(k)])?;
        let most = i32::MAX as usize - 512;
        let fits = n % 16 == 0 && k > 0 && k % 8 == 0 && tokens.max(n).max(k) <= most;
        if !fits || self.capability() != (9, 0) {
            let expected =
                "rows in multiples of 16, columns of 8, and a GPU of compute capability 9.0";
            return Err(operand("w", w).argument(expected, format!("[{n}, {k}] for {tokens} rows")));
        }
        let outputs = n / 2;
        let y = self.empty(&[tokens, outputs], w.kind())?;
        if tokens == 0 || n == 0 {
            return Ok(y);
        }
        let y_map = TensorMap::new(&y, [outputs, tokens], &[outputs], [64, 16])?;
        // Eight rows of the gate, the eight of up that belong to them, the next eight: column, row of
        // eight, half, eight.
        let w_map = TensorMap::new(
            w,
            [k, 8, 2, n / 16],
            &[k, outputs * k, 8 * k],
            [64, 8, 2, COLUMNS / 16 / CLUSTER],
        )?;
        let x_map = TensorMap::new(x, [k, tokens], &[k], [64, TOKENS])?;
        let function = self.function(&SOURCE, "gated_product", &[(element(w.kind()), 1)])?;
        let (tiles, clusters) = tiles(tokens, n, self.num_sms());
        let blocks = CLUSTER * tiles.min(clusters);
        let mut launch = Launch::new([blocks as u32, 1, 1], THREADS)
            .shared(SHARED as u32)
            .pdl();
        launch.cluster = CLUSTER as u32;
        let args = [
            (&y_map).into(),
            (&w_map).into(),
            (&x_map).into(),
            Arg::from(tokens as i32),
            Arg::from(outputs as i32),
            Arg::from(k as i32),
        ];
        // SAFETY: shapes, types and devices were checked; the shared memory and the boxes of the maps
        // are those that the kernel lays out.
        unsafe { self.launch(function, &launch, &args)? };
        Ok(y)
    }
}
