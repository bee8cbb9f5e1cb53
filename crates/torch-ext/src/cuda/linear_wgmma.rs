//! Matrix products of up to 512 rows on Hopper's warpgroup instructions.

use tch::{Kind, Tensor};

use super::check::{HALVES, Operand};
use super::compile::Source;
use super::kernels::{Arg, Defines, Kernels, Launch};
use super::linear_wgmma_plan::{MAX_ROWS, MOST_ADDED, Problem, WgmmaPlan, best, plans, wins};
use super::rope::{element, same_kind};
use super::tensor_map::TensorMap;
use crate::Error;

pub(crate) static SOURCE: Source = Source {
    name: "linear_wgmma",
    text: concat!(
        include_str!("../../csrc/cuda/hopper.cuh"),
        include_str!("../../csrc/cuda/linear.cuh"),
        include_str!("../../csrc/cuda/linear_wgmma_end.cuh"),
        include_str!("../../csrc/cuda/linear_wgmma.cu")
    ),
    variants: &[
        &[
            "T_BF16=1", "NT=4", "WGS=1", "SPLIT=8", "SHARE=1", "STAGES=8", "SILU=0", "ADD=0",
            "SCALED=0",
        ],
        &[
            "T_HALF=1", "NT=8", "WGS=2", "SPLIT=2", "SHARE=2", "STAGES=8", "SILU=0", "ADD=0",
            "SCALED=1",
        ],
        &[
            "T_BF16=1", "NT=16", "WGS=4", "SPLIT=1", "SHARE=2", "STAGES=4", "SILU=1", "ADD=0",
            "SCALED=1",
        ],
        &[
            "T_HALF=1", "NT=16", "WGS=3", "SPLIT=1", "SHARE=1", "STAGES=5", "SILU=0", "ADD=0",
            "SCALED=0",
        ],
        &[
            "T_BF16=1", "NT=16", "WGS=1", "SPLIT=2", "SHARE=1", "STAGES=9", "SILU=0", "ADD=1",
            "SCALED=0",
        ],
        &[
            "T_BF16=1", "NT=28", "WGS=2", "SPLIT=1", "SHARE=4", "STAGES=4", "SILU=1", "ADD=0",
            "SCALED=0",
        ],
    ],
};

/// The RMS norm of rows whose last step, one factor a row, is left to the product that takes them: what
/// [`Kernels::linear_wgmma_add`] makes, and [`Kernels::linear_wgmma_deferred`] takes.
#[derive(Debug)]
pub struct DeferredNorm {
    /// `[rows, width]`: the residual times the norm's weight.
    rows: Tensor,
    /// float32 `[parts, at least rows]`: squares of the residual. A column's sum is that of a row.
    squares: Tensor,
    eps: f64,
}

impl DeferredNorm {
    /// How many rows.
    pub fn num_rows(&self) -> usize {
        self.rows.size()[0] as usize
    }

    /// The norm itself, `[rows, width]`, for products that cannot take it like this.
    pub fn finish(&self) -> Tensor {
        let (rows, width) = (self.rows.size()[0], self.rows.size()[1]);
        let sums = self
            .squares
            .sum_dim_intlist(0i64, false, Kind::Float)
            .narrow(0, 0, rows);
        let factors = (sums / width as f64 + self.eps).rsqrt().unsqueeze(1);
        (self.rows.to_kind(Kind::Float) * factors).to_kind(self.rows.kind())
    }
}

/// What a launch does beside the product.
#[derive(Default)]
struct Extras<'a> {
    /// `silu(gate) * up` of the product.
    gated: bool,
    /// The residual, to which the product is added, and the weight of the norm that follows.
    add: Option<(&'a Tensor, &'a Tensor)>,
    /// What x lacks.
    deferred: Option<&'a DeferredNorm>,
}

/// What a launch writes.
struct Written {
    y: Tensor,
    /// With [`Extras::add`].
    squares: Option<Tensor>,
}

impl Kernels {
    /// Whether [`linear_wgmma`](Self::linear_wgmma) is the kernel of choice for so many rows of x and
    /// a weight of `[out_features, in_features]`: never before or after Hopper.
    pub fn prefers_wgmma(&self, rows: usize, out_features: usize, in_features: usize) -> bool {
        // Asked for every product of a step: no plan is made for the answer.
        self.capability() == (9, 0)
            && out_features > 0
            && in_features > 0
            && in_features.is_multiple_of(8)
            && wins(rows, out_features, self.num_sms())
    }

    /// `x w^T + bias` (`[rows, n]`) for up to 512 rows: `x` `[rows, k]`, `w` `[n, k]`, `bias` `[n]`,
    /// all bfloat16 or all float16; `k` a multiple of 8. Compute capability 9.0 alone. Sums are
    /// float32.
    ///
    /// A row's result does not depend on the other rows, nor on timing. It may differ by rounding of
    /// the sum from that in a batch of another number of rows, if K is divided differently there.
    /// Reads `w` before it waits for earlier kernels: none of those may write it.
    pub fn linear_wgmma(
        &self,
        x: &Tensor,
        w: &Tensor,
        bias: Option<&Tensor>,
    ) -> Result<Tensor, Error> {
        let written = self.wgmma("linear_wgmma", None, x, w, bias, Extras::default())?;
        Ok(written.y)
    }

    /// Whether [`linear_wgmma_add`](Self::linear_wgmma_add) exists for so many rows and a weight of
    /// `[out_features, in_features]`, and is the kernel of choice.
    pub fn prefers_wgmma_add(&self, rows: usize, out_features: usize, in_features: usize) -> bool {
        let problem = Problem {
            tokens: rows,
            n: out_features,
            k: in_features,
            gated: false,
            normed: true,
        };
        rows <= MOST_ADDED
            && self.prefers_wgmma(rows, out_features, in_features)
            && out_features.is_multiple_of(8)
            && best(problem, self.num_sms()).is_some_and(|plan| plan.adds())
    }

    /// `residual += x w^T + bias` in place, the product rounded first, and the RMS norm of the sum with
    /// the weight `gain` (`[n]`), less its last step. As [`linear_wgmma`](Self::linear_wgmma) otherwise; `n` a
    /// multiple of 8, where [`prefers_wgmma_add`](Self::prefers_wgmma_add) says so.
    ///
    /// The residual times `gain` is rounded before the root mean square divides it, which
    /// [`rms_norm`](Self::rms_norm) does the other way round.
    pub fn linear_wgmma_add(
        &self,
        x: &Tensor,
        w: &Tensor,
        bias: Option<&Tensor>,
        residual: &mut Tensor,
        gain: &Tensor,
        eps: f64,
    ) -> Result<DeferredNorm, Error> {
        let extras = Extras {
            add: Some((residual, gain)),
            ..Extras::default()
        };
        let written = self.wgmma("linear_wgmma_add", None, x, w, bias, extras)?;
        Ok(DeferredNorm {
            rows: written.y,
            squares: written.squares.unwrap_or_default(),
            eps,
        })
    }

    /// [`linear_wgmma`](Self::linear_wgmma) of a norm's rows.
    pub fn linear_wgmma_deferred(
        &self,
        x: &DeferredNorm,
        w: &Tensor,
        bias: Option<&Tensor>,
    ) -> Result<Tensor, Error> {
        let extras = Extras {
            deferred: Some(x),
            ..Extras::default()
        };
        let op = "linear_wgmma_deferred";
        Ok(self.wgmma(op, None, &x.rows, w, bias, extras)?.y)
    }

    /// [`linear_wgmma_gated`](Self::linear_wgmma_gated) of a norm's rows.
    pub fn linear_wgmma_gated_deferred(
        &self,
        x: &DeferredNorm,
        w: &Tensor,
    ) -> Result<Tensor, Error> {
        let extras = Extras {
            gated: true,
            deferred: Some(x),
            ..Extras::default()
        };
        let op = "linear_wgmma_gated_deferred";
        Ok(self.wgmma(op, None, &x.rows, w, None, extras)?.y)
    }

    /// `silu(gate) * up` (`[rows, n / 2]`) of `x w^T`, with `w` `[n, k]`, the gate's rows first, and
    /// `n` a multiple of 16: as [`linear_wgmma`](Self::linear_wgmma) and then
    /// [`silu_mul`](Self::silu_mul), rounded where they round.
    pub fn linear_wgmma_gated(&self, x: &Tensor, w: &Tensor) -> Result<Tensor, Error> {
        let extras = Extras {
            gated: true,
            ..Extras::default()
        };
        Ok(self
            .wgmma("linear_wgmma_gated", None, x, w, None, extras)?
            .y)
    }

    /// Every way to launch the kernel for a problem. For benchmarks.
    pub fn linear_wgmma_plans(
        &self,
        rows: usize,
        out_features: usize,
        in_features: usize,
        gated: bool,
    ) -> Vec<WgmmaPlan> {
        let (tokens, n, k) = (rows, out_features, in_features);
        let problem = Problem {
            tokens,
            n,
            k,
            gated,
            normed: false,
        };
        match self.capability() {
            (9, 0) => plans(problem, self.num_sms()),
            _ => Vec::new(),
        }
    }

    /// [`linear_wgmma`](Self::linear_wgmma), or with `gated`
    /// [`linear_wgmma_gated`](Self::linear_wgmma_gated), by this one of
    /// [`linear_wgmma_plans`](Self::linear_wgmma_plans). For benchmarks and tests.
    pub fn linear_wgmma_by(
        &self,
        plan: WgmmaPlan,
        x: &Tensor,
        w: &Tensor,
        bias: Option<&Tensor>,
        gated: bool,
    ) -> Result<Tensor, Error> {
        let extras = Extras {
            gated,
            ..Extras::default()
        };
        Ok(self
            .wgmma("linear_wgmma_by", Some(plan), x, w, bias, extras)?
            .y)
    }

    fn wgmma(
        &self,
        op: &'static str,
        plan: Option<WgmmaPlan>,
        x: &Tensor,
        w: &Tensor,
        bias: Option<&Tensor>,
        extras: Extras<'_>,
    ) -> Result<Written, Error> {
        let gated = extras.gated;
        let operand = |name, tensor| Operand {
            op,
            name,
            tensor,
            device: self.device(),
        };
        let [n, k] = operand("w", w).vectors(HALVES, [None, None])?;
        let kind = same_kind(w.kind());
        let [tokens, _] = operand("x", x).vectors(kind, [None, Some(k)])?;
        if let Some(bias) = bias {
            operand("bias", bias).of(kind, [Some(n)])?;
        }
        if gated && n % 16 != 0 {
            return Err(operand("w", w).argument("a multiple of 16 rows (gate and up)", n));
        }
        if let Some((residual, gain)) = extras.add {
            operand("residual", residual).vectors(kind, [Some(tokens), Some(n)])?;
            operand("gain", gain).vectors(kind, [Some(n)])?;
        }
        let outputs = if gated { n / 2 } else { n };
        let y = self.empty(&[tokens, outputs], w.kind())?;
        if tokens == 0 || n == 0 {
            let squares = self.empty(&[0, tokens], Kind::Float)?;
            let squares = extras.add.is_some().then_some(squares);
            return Ok(Written { y, squares });
        }
        let problem = Problem {
            tokens,
            n,
            k,
            gated,
            normed: extras.add.is_some() || extras.deferred.is_some(),
        };
        let chosen = match (self.capability(), plan) {
            ((9, 0), None) => best(problem, self.num_sms()),
            ((9, 0), Some(plan)) => plans(problem, self.num_sms())
                .into_iter()
                .find(|p| *p == plan),
            _ => None,
        };
        let Some(plan) = chosen else {
            return Err(Error::Argument {
                op,
                operand: "rows",
                expected: format!(
                    "at most {MAX_ROWS} for a weight of [{n}, {k}], a GPU of compute capability \
                     9.0, and a plan for them"
                ),
                found: format!("{tokens}, {:?}", self.capability()),
            });
        };
        // One column for each row that the kernel is built for, more than there are.
        let columns = 8 * plan.nt;
        let (squares, parts) = match (extras.add, extras.deferred) {
            (Some(_), None) if plan.adds() => {
                let squares = self.empty(&[plan.tiles, columns], Kind::Float)?;
                (Some(squares), plan.tiles)
            }
            (None, Some(norm)) => {
                let squares = operand("squares", &norm.squares);
                let [parts, _] = squares.of(&[Kind::Float], [None, Some(columns)])?;
                (Some(norm.squares.shallow_clone()), parts)
            }
            (None, None) => (None, 0),
            _ => {
                let expected = "a weight of whose plan every block has 64 rows";
                return Err(operand("w", w).argument(expected, format!("{plan:?}")));
            }
        };
        let rows = 64 * plan.wgs;
        let w_map = match gated {
            false => TensorMap::new(w, [k, n], &[k], [64, rows])?,
            // Eight rows of the gate, the eight of up that belong to them, the next eight: column,
            // row of eight, half, eight.
            true => TensorMap::new(
                w,
                [k, 8, 2, n / 16],
                &[k, n / 2 * k, 8 * k],
                [64, 8, 2, rows / 16],
            )?,
        };
        let x_map = TensorMap::new(x, [k, tokens], &[k], [64, plan.x_rows(tokens)])?;
        let defines: Defines = smallvec::smallvec![
            (element(w.kind()), 1),
            ("NT", plan.nt as i64),
            ("WGS", plan.wgs as i64),
            ("SPLIT", plan.split as i64),
            ("SHARE", plan.share as i64),
            ("STAGES", plan.stages as i64),
            ("SILU", i64::from(gated)),
            ("ADD", i64::from(extras.add.is_some())),
            ("SCALED", i64::from(extras.deferred.is_some())),
        ];
        let function = self.function(&SOURCE, "linear_wgmma", &defines)?;
        let blocks = plan.blocks();
        // One more warp adds up the squares.
        let threads = plan.threads() + 32 * usize::from(extras.deferred.is_some());
        let mut launch = Launch::new([blocks as u32, 1, 1], threads as u32)
            .shared(plan.shared() as u32)
            .pdl();
        launch.cluster = plan.cluster() as u32;
        let args = [
            (&y).into(),
            bias.into(),
            (&w_map).into(),
            (&x_map).into(),
            Arg::from(tokens as i32),
            Arg::from(outputs as i32),
            Arg::from(k as i32),
            Arg::from(plan.tiles as i32),
            extras.add.map(|(residual, _)| residual).into(),
            extras.add.map(|(_, gain)| gain).into(),
            squares.as_ref().into(),
            Arg::from(parts as i32),
            Arg::from(extras.deferred.map_or(0.0, |norm| norm.eps) as f32),
            Arg::from(plan.x_rows(tokens) as i32),
            Arg::from(plan.spans as i32),
        ];
        // SAFETY: shapes, types and devices were checked; the plan is one for this problem, and gives
        // the shared memory that the kernel lays out and the boxes of the maps.
        unsafe { self.launch(function, &launch, &args)? };
        Ok(Written {
            y,
            squares: squares.filter(|_| extras.add.is_some()),
        })
    }
}
