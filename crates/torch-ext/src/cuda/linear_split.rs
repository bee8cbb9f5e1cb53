//! Matrix products with 33 to 64 rows and weights too small for tiles of a usual size.

use tch::Tensor;

use super::compile::Source;
use super::kernels::{Arg, Kernels, Launch};
use super::rope::element;
use crate::Error;

pub(crate) static SOURCE: Source = Source {
    name: "linear_split",
    text: concat!(
        include_str!("../../csrc/cuda/linear.cuh"),
        include_str!("../../csrc/cuda/linear_split.cu")
    ),
    variants: &[
        &[
            "T_BF16=1",
            "NT=8",
            "STAGES=4",
            "WARPS=4",
            "CLUSTER=1",
            "SILU=0",
        ],
        &[
            "T_HALF=1",
            "NT=8",
            "STAGES=4",
            "WARPS=4",
            "CLUSTER=1",
            "SILU=1",
        ],
    ],
};

// As in the source.
const WARPS: usize = 4;
const THREADS: usize = 32 * WARPS;
const CHUNK: usize = 64;

/// Groups of eight tokens, and pipeline stages. With more of either, less than two thread blocks
/// fit on a multiprocessor, which costs more than it brings.
const NT: usize = 8;
const STAGES: usize = 4;

/// Most rows of x that the kernel takes. With 128, cuBLAS was faster.
pub(super) const MAX_ROWS: usize = 8 * NT;
/// Most elements of a weight. From 16 million on, cuBLAS was faster.
pub(super) const MAX_WEIGHT: usize = 8 << 20;

/// How the kernel is built and launched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Plan {
    cluster: usize,
    blocks: usize,
    shared: usize,
}

/// How to multiply `tokens` rows by a weight of `[n, k]` (`silu`: pairs of rows), if this kernel
/// is the one to do it: the GPU has clusters, and cuBLAS would leave much of it idle. The figures
/// were chosen by measurement on an H100.
pub(super) fn plan(
    tokens: usize,
    [n, k]: [usize; 2],
    num_sms: usize,
    capability: (i32, i32),
) -> Option<Plan> {
    if capability.0 != 9 || tokens > MAX_ROWS || n.checked_mul(k)? > MAX_WEIGHT {
        return None;
    }
    let bands = n.div_ceil(16).div_ceil(WARPS);
    let cluster = [8, 4, 2, 1]
        .into_iter()
        .find(|c| 2 * bands * c <= 3 * num_sms)?;
    let sums = if cluster > 1 { WARPS * NT * 512 } else { 0 };
    let stage = 4 * THREADS * 16 + NT * 8 * CHUNK * 2;
    Some(Plan {
        cluster,
        blocks: bands * cluster,
        shared: STAGES * stage + sums,
    })
}

impl Kernels {
    /// `y = x w^T + bias`, or the activation of it. The arguments were checked.
    ///
    /// # Safety
    /// Shapes, types and devices fit each other and the plan.
    pub(super) unsafe fn linear_split(
        &self,
        plan: Plan,
        y: &Tensor,
        x: &Tensor,
        w: &Tensor,
        bias: Option<&Tensor>,
        silu: bool,
    ) -> Result<(), Error> {
        let defines = [
            (element(w.kind()), 1),
            ("NT", NT as i64),
            ("STAGES", STAGES as i64),
            ("WARPS", WARPS as i64),
            ("CLUSTER", plan.cluster as i64),
            ("SILU", i64::from(silu)),
        ];
        let function = self.function(&SOURCE, "linear_split", &defines)?;
        let mut launch = Launch::new([plan.blocks as u32, 1, 1], THREADS as u32)
            .shared(plan.shared as u32)
            .pdl();
        launch.cluster = plan.cluster as u32;
        let args = [
            y.into(),
            x.into(),
            w.into(),
            bias.into(),
            Arg::from(x.size()[0] as i32),
            Arg::from(y.size()[1] as i32),
            Arg::from(w.size()[1] as i32),
        ];
        // SAFETY: the caller's promise; the plan gives the shared memory that the kernel lays out.
        unsafe { self.launch(function, &launch, &args) }
    }
}
