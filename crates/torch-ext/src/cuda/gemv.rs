//! Matrix products with few rows (decode), alone and with what surrounds them in a layer.

use tch::{Kind, Tensor};

use super::check::{HALVES, Operand};
use super::compile::Source;
use super::gemv_plan::{MAX_ROWS, Problem, THREADS, plan};
use super::kernels::{Arg, Kernels, Launch};
use super::rope::{element, same_kind};
use crate::Error;

pub(crate) static SOURCE: Source = Source {
    name: "gemv",
    text: concat!(
        include_str!("../../csrc/cuda/linear.cuh"),
        include_str!("../../csrc/cuda/gemv.cu")
    ),
    variants: &[
        &[
            "T_BF16=1",
            "R=1",
            "NT=1",
            "STAGES=6",
            "X_STREAM=0",
            "NORM=0",
            "SILU=0",
        ],
        &[
            "T_BF16=1",
            "R=3",
            "NT=1",
            "STAGES=6",
            "X_STREAM=0",
            "NORM=1",
            "SILU=1",
        ],
        &[
            "T_HALF=1",
            "R=2",
            "NT=1",
            "STAGES=5",
            "X_STREAM=0",
            "NORM=1",
            "SILU=0",
        ],
        &[
            "T_HALF=1",
            "R=2",
            "NT=2",
            "STAGES=6",
            "X_STREAM=1",
            "NORM=0",
            "SILU=1",
        ],
        &[
            "T_BF16=1",
            "R=3",
            "NT=4",
            "STAGES=4",
            "X_STREAM=1",
            "NORM=0",
            "SILU=0",
        ],
    ],
};

/// Elements of a weight from which cuBLAS reads as fast with more than 16 rows.
const LARGE: usize = 8 << 20;

/// Operands of one launch. `x`, `norm` and `residual_out` were checked against `w` by the caller.
struct Operands<'a> {
    x: Option<&'a Tensor>,
    w: &'a Tensor,
    bias: Option<&'a Tensor>,
    /// Residual, its norm's weight and epsilon, and where residual + x goes.
    norm: Option<(&'a Tensor, &'a Tensor, f64, &'a Tensor)>,
}

impl Kernels {
    /// Up to how many rows of x [`linear_small`](Self::linear_small) takes for a weight of
    /// `[out_features, in_features]`, and is faster than cuBLAS; 0 if it does not take the weight.
    pub fn linear_small_rows(&self, out_features: usize, in_features: usize) -> usize {
        match self.invariant_rows(out_features, in_features) {
            // Streams of large weights: cuBLAS reads as fast from here on (H200, 8B: 4.3 ms a step
            // against 4.8 at 32 rows, 4.2 against 4.1 at 16).
            MAX_ROWS if out_features.saturating_mul(in_features) > LARGE => 16,
            rows => rows,
        }
    }

    /// Up to how many rows [`linear_small`](Self::linear_small) takes with a result for each row
    /// that is the same to the last bit however many there are; 0 if it does not take the weight.
    pub fn invariant_rows(&self, out_features: usize, in_features: usize) -> usize {
        if in_features == 0 || !in_features.is_multiple_of(8) || out_features == 0 {
            return 0;
        }
        let few = |tokens: &usize| {
            let problem = Problem {
                tokens: *tokens,
                outputs: out_features,
                k: in_features,
                norm: false,
                silu: false,
            };
            plan(problem, self.num_sms(), self.capability()).is_some()
        };
        [MAX_ROWS, 16, 8].into_iter().find(few).unwrap_or(0)
    }

    /// Up to how many rows [`add_norm_linear`](Self::add_norm_linear) and
    /// [`add_norm_gated`](Self::add_norm_gated) take, and are faster than what they stand for.
    pub fn fused_rows(&self, out_features: usize, in_features: usize) -> usize {
        self.linear_small_rows(out_features, in_features)
    }

    /// `x w^T + bias` (`[rows, n]`) for few rows: `x` `[rows, k]`, `w` `[n, k]`, `bias` `[n]`, all
    /// bfloat16 or all float16; `k` a multiple of 8, at most
    /// [`linear_small_rows`](Self::linear_small_rows) rows. Sums are float32.
    ///
    /// The result for a row does not depend on the others, nor on how many there are. Reads `w`
    /// before it waits for earlier kernels: none of those may write it.
    pub fn linear_small(
        &self,
        x: &Tensor,
        w: &Tensor,
        bias: Option<&Tensor>,
    ) -> Result<Tensor, Error> {
        let op = "linear_small";
        let (_, k) = self.weight(op, w, bias)?;
        self.operand(op, "x", x)
            .vectors(same_kind(w.kind()), [None, Some(k)])?;
        let norm = None;
        let x = Some(x);
        self.small(op, Operands { x, w, bias, norm }, false)
    }

    /// `rms_norm(residual + x) w^T + bias` and `residual + x` (a new tensor), as
    /// [`add_rms_norm`](Self::add_rms_norm) and [`linear_small`](Self::linear_small) compute them,
    /// in one kernel if the rows are few enough. Without `x`, `residual` itself is normalized.
    ///
    /// That one kernel adds up the squares of a row in an order that depends on the number of rows,
    /// so a row's result may differ by rounding from the one in another batch. Where it must not,
    /// call the two functions themselves, for at most 32 rows.
    pub fn add_norm_linear(
        &self,
        residual: &Tensor,
        x: Option<&Tensor>,
        norm_weight: &Tensor,
        eps: f64,
        w: &Tensor,
        bias: Option<&Tensor>,
    ) -> Result<(Tensor, Tensor), Error> {
        let norm = (norm_weight, eps);
        self.normed("add_norm_linear", residual, x, norm, w, bias, false)
    }

    /// `silu(gate) * up` (`[rows, n]`) of `rms_norm(residual + x) w^T`, with `w` `[2 n, k]`, gate
    /// first, and `residual + x`: what [`add_norm_linear`](Self::add_norm_linear) and
    /// [`silu_mul`](Self::silu_mul) compute, rounded where they round.
    pub fn add_norm_gated(
        &self,
        residual: &Tensor,
        x: Option<&Tensor>,
        norm_weight: &Tensor,
        eps: f64,
        w: &Tensor,
    ) -> Result<(Tensor, Tensor), Error> {
        let norm = (norm_weight, eps);
        self.normed("add_norm_gated", residual, x, norm, w, None, true)
    }

    #[allow(clippy::too_many_arguments)]
    fn normed(
        &self,
        op: &'static str,
        residual: &Tensor,
        x: Option<&Tensor>,
        (norm_weight, eps): (&Tensor, f64),
        w: &Tensor,
        bias: Option<&Tensor>,
        silu: bool,
    ) -> Result<(Tensor, Tensor), Error> {
        let (n, k) = self.weight(op, w, bias)?;
        let kind = same_kind(w.kind());
        let [tokens, _] = self
            .operand(op, "residual", residual)
            .vectors(kind, [None, Some(k)])?;
        if let Some(x) = x {
            self.operand(op, "x", x)
                .vectors(kind, [Some(tokens), Some(k)])?;
        }
        self.operand(op, "norm_weight", norm_weight)
            .vectors(kind, [Some(k)])?;
        let problem = Problem {
            tokens,
            outputs: if silu { n / 2 } else { n },
            k,
            norm: true,
            silu,
        };
        // Without an addition the sum is the residual; the result is a tensor of its own all the
        // same, so that it can be added to in place.
        let sum = self.empty(&[tokens, k], w.kind())?;
        if plan(problem, self.num_sms(), self.capability()).is_some() {
            let norm = Some((residual, norm_weight, eps, &sum));
            let y = self.small(op, Operands { x, w, bias, norm }, silu)?;
            return Ok((y, sum));
        }
        let (normed, sum) = match x {
            Some(x) => {
                let add = Some((residual, &sum));
                (self.norm(op, x, add, norm_weight, eps)?, sum)
            }
            None => {
                let mut sum = sum;
                sum.f_copy_(residual)
                    .map_err(|e| super::CudaError(e.to_string()))?;
                (self.norm(op, residual, None, norm_weight, eps)?, sum)
            }
        };
        let (x, norm) = (Some(&normed), None);
        let y = self.small(op, Operands { x, w, bias, norm }, silu)?;
        Ok((y, sum))
    }

    fn operand<'a>(&self, op: &'static str, name: &'static str, tensor: &'a Tensor) -> Operand<'a> {
        Operand {
            op,
            name,
            tensor,
            device: self.device(),
        }
    }

    /// Checks a weight and its bias; rows and columns of the weight.
    fn weight(
        &self,
        op: &'static str,
        w: &Tensor,
        bias: Option<&Tensor>,
    ) -> Result<(usize, usize), Error> {
        let operand = self.operand(op, "w", w);
        let [n, k] = operand.vectors(HALVES, [None, None])?;
        if n == 0 || k == 0 || n.max(k) > i32::MAX as usize - 64 {
            return Err(operand.argument("a matrix of at most 2^31 rows and columns", n.max(k)));
        }
        if let Some(bias) = bias {
            self.operand(op, "bias", bias)
                .of(same_kind(w.kind()), [Some(n)])?;
        }
        Ok((n, k))
    }

    fn small(&self, op: &'static str, a: Operands, silu: bool) -> Result<Tensor, Error> {
        let input = a.x.or(a.norm.map(|norm| norm.0));
        let tokens = input.map_or(0, |x| x.size()[0] as usize);
        let (n, k) = (a.w.size()[0] as usize, a.w.size()[1] as usize);
        if silu && n % 2 != 0 {
            let operand = self.operand(op, "w", a.w);
            return Err(operand.argument("an even number of rows (gate and up)", n));
        }
        let outputs = if silu { n / 2 } else { n };
        let y = self.empty(&[tokens, outputs], a.w.kind())?;
        if tokens == 0 {
            return Ok(y);
        }
        let problem = Problem {
            tokens,
            outputs,
            k,
            norm: a.norm.is_some(),
            silu,
        };
        let Some(plan) = plan(problem, self.num_sms(), self.capability()) else {
            let most = self.linear_small_rows(n, k);
            return Err(Error::Argument {
                op,
                operand: "rows",
                expected: format!("at most {most} for a weight of [{n}, {k}]"),
                found: tokens.to_string(),
            });
        };
        let defines = [
            (element(a.w.kind()), 1),
            ("R", plan.r as i64),
            ("NT", plan.nt as i64),
            ("STAGES", plan.stages as i64),
            ("X_STREAM", i64::from(plan.x_stream)),
            ("NORM", i64::from(a.norm.is_some())),
            ("SILU", i64::from(silu)),
        ];
        let function = self.function(&SOURCE, "linear_small", &defines)?;
        let launch = Launch::new([plan.blocks as u32, 1, 1], THREADS as u32)
            .shared(plan.shared as u32)
            .pdl();
        let args = [
            (&y).into(),
            a.x.into(),
            a.w.into(),
            a.bias.into(),
            Arg::from(tokens as i32),
            Arg::from(outputs as i32),
            Arg::from(k as i32),
            a.norm.map(|norm| norm.0).into(),
            a.norm.map(|norm| norm.3).into(),
            a.norm.map(|norm| norm.1).into(),
            Arg::from(a.norm.map_or(0.0, |norm| norm.2) as f32),
        ];
        // SAFETY: the callers checked the shapes; the plan gives the shared memory that the kernel
        // lays out, and room for this many tokens.
        unsafe { self.launch(function, &launch, &args)? };
        Ok(y)
    }

    /// An uninitialized tensor on the device.
    pub(super) fn empty(&self, size: &[usize], kind: Kind) -> Result<Tensor, Error> {
        let size: Vec<i64> = size.iter().map(|n| *n as i64).collect();
        Tensor::f_empty(size, (kind, self.device()))
            .map_err(|e| super::CudaError(e.to_string()).into())
    }
}
