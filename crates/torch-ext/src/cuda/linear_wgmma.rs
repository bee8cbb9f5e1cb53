//! Matrix products of up to 128 rows on Hopper's warpgroup instructions.

use tch::Tensor;

use super::check::{HALVES, Operand};
use super::compile::Source;
use super::kernels::{Arg, Defines, Kernels, Launch};
use super::linear_wgmma_plan::{GROUPS, MAX_ROWS, Problem, WgmmaPlan, best, plans, wins};
use super::rope::{element, same_kind};
use super::tensor_map::TensorMap;
use crate::Error;

pub(crate) static SOURCE: Source = Source {
    name: "linear_wgmma",
    text: concat!(
        include_str!("../../csrc/cuda/hopper.cuh"),
        include_str!("../../csrc/cuda/linear.cuh"),
        include_str!("../../csrc/cuda/linear_wgmma.cu")
    ),
    variants: &[
        &[
            "T_BF16=1", "NT=4", "WGS=1", "SPLIT=8", "SHARE=1", "STAGES=8", "SILU=0",
        ],
        &[
            "T_HALF=1", "NT=8", "WGS=2", "SPLIT=2", "SHARE=2", "STAGES=8", "SILU=0",
        ],
        &[
            "T_BF16=1", "NT=16", "WGS=4", "SPLIT=1", "SHARE=2", "STAGES=4", "SILU=1",
        ],
        &[
            "T_HALF=1", "NT=16", "WGS=3", "SPLIT=1", "SHARE=1", "STAGES=5", "SILU=0",
        ],
    ],
};

impl Kernels {
    /// Whether [`linear_wgmma`](Self::linear_wgmma) is the kernel of choice for so many rows of x and
    /// a weight of `[out_features, in_features]`: never before or after Hopper.
    pub fn prefers_wgmma(&self, rows: usize, out_features: usize, in_features: usize) -> bool {
        // Asked for every product of a step: no plan is made for the answer.
        self.capability() == (9, 0)
            && out_features > 0
            && in_features > 0
            && in_features.is_multiple_of(8)
            && wins(rows, out_features, in_features, self.num_sms())
    }

    /// `x w^T + bias` (`[rows, n]`) for up to 128 rows: `x` `[rows, k]`, `w` `[n, k]`, `bias` `[n]`,
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
        self.wgmma("linear_wgmma", None, x, w, bias, false)
    }

    /// `silu(gate) * up` (`[rows, n / 2]`) of `x w^T`, with `w` `[n, k]`, the gate's rows first, and
    /// `n` a multiple of 16: as [`linear_wgmma`](Self::linear_wgmma) and then
    /// [`silu_mul`](Self::silu_mul), rounded where they round.
    pub fn linear_wgmma_gated(&self, x: &Tensor, w: &Tensor) -> Result<Tensor, Error> {
        self.wgmma("linear_wgmma_gated", None, x, w, None, true)
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
        self.wgmma("linear_wgmma_by", Some(plan), x, w, bias, gated)
    }

    fn wgmma(
        &self,
        op: &'static str,
        plan: Option<WgmmaPlan>,
        x: &Tensor,
        w: &Tensor,
        bias: Option<&Tensor>,
        gated: bool,
    ) -> Result<Tensor, Error> {
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
        let outputs = if gated { n / 2 } else { n };
        let y = self.empty(&[tokens, outputs], w.kind())?;
        if tokens == 0 || n == 0 {
            return Ok(y);
        }
        let problem = Problem {
            tokens,
            n,
            k,
            gated,
        };
        let automatic = plan.is_none();
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
        let x_map = TensorMap::new(x, [k, tokens], &[k], [64, 8 * plan.nt / plan.share])?;
        let defines_of = |plan: &WgmmaPlan| -> Defines {
            smallvec::smallvec![
                (element(w.kind()), 1),
                ("NT", plan.nt as i64),
                ("WGS", plan.wgs as i64),
                ("SPLIT", plan.split as i64),
                ("SHARE", plan.share as i64),
                ("STAGES", plan.stages as i64),
                ("SILU", i64::from(gated)),
            ]
        };
        let defines = defines_of(&plan);
        if automatic && !self.knows(&SOURCE, "linear_wgmma", &defines) {
            // The same weight for other numbers of rows is likely to follow: a runner captures graphs
            // of all sizes, and compiling one after the other would take seconds.
            let others = GROUPS.into_iter().filter_map(|nt| {
                let tokens = 8 * nt;
                best(Problem { tokens, ..problem }, self.num_sms())
            });
            let lists: Vec<Defines> = std::iter::once(defines.clone())
                .chain(
                    others
                        .map(|plan| defines_of(&plan))
                        .filter(|d| *d != defines),
                )
                .collect();
            self.compile_ahead(&SOURCE, &lists);
        }
        let function = self.function(&SOURCE, "linear_wgmma", &defines)?;
        let blocks = plan.clusters * plan.cluster();
        let mut launch = Launch::new([blocks as u32, 1, 1], plan.threads() as u32)
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
        ];
        // SAFETY: shapes, types and devices were checked; the plan is one for this problem, and gives
        // the shared memory that the kernel lays out and the boxes of the maps.
        unsafe { self.launch(function, &launch, &args)? };
        Ok(y)
    }
}
