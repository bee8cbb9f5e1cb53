//! Sequences in a paged cache, and what attention to them is in float64.

use rand::{rngs::StdRng, seq::SliceRandom};
use tch::{Device, Kind, Tensor};
use torch_ext::cuda::{Heads, PagedKv, Scores};

pub fn heads(heads: usize, kv_heads: usize, head_dim: usize) -> Heads {
    Heads {
        heads,
        kv_heads,
        head_dim,
    }
}

/// ‖a - b‖ / ‖b‖; NaN if `a` holds any.
pub fn distance(a: &Tensor, b: &Tensor) -> f64 {
    let (a, b) = (a.to_kind(Kind::Double), b.to_kind(Kind::Double));
    let norm = |x: &Tensor| x.square().sum(Kind::Double).sqrt().double_value(&[]);
    norm(&(a - &b)) / norm(&b).max(1e-30)
}

pub fn tolerance(kind: Kind) -> f64 {
    if kind == Kind::Half { 1e-3 } else { 4e-3 }
}

/// Sequences in a cache whose unused tokens are NaN.
pub struct Case {
    pub heads: Heads,
    pub kind: Kind,
    pub block_size: usize,
    /// New tokens of each sequence, and its context with them.
    pub lens: Vec<(usize, usize)>,
    pub scores: Scores,
    pub q: Tensor,
    pub k: Tensor,
    pub v: Tensor,
    pub block_tables: Tensor,
    pub query_start: Tensor,
    pub context_len: Tensor,
}

impl Case {
    pub fn new(
        rng: &mut StdRng,
        heads: Heads,
        block_size: usize,
        kind: Kind,
        lens: Vec<(usize, usize)>,
        window: Option<usize>,
        soft_cap: Option<f64>,
    ) -> Self {
        let on = Device::Cuda(0);
        let blocks_of = |context: usize| context.div_ceil(block_size);
        let need: usize = lens.iter().map(|l| blocks_of(l.1)).sum();
        let width = lens.iter().map(|l| blocks_of(l.1)).max().unwrap_or(0) + 1;
        let mut free: Vec<i32> = (0..need as i32 + 3).collect();
        free.shuffle(rng);
        let cache = [free.len(), heads.kv_heads, block_size, heads.head_dim].map(|n| n as i64);
        let [k, v] = [(); 2].map(|()| Tensor::full(cache, f64::NAN, (kind, on)));
        let (mut tables, mut starts) = (vec![0i32; lens.len() * width], vec![0i32]);
        for (i, &(new, context)) in lens.iter().enumerate() {
            starts.push(starts[i] + new as i32);
            for entry in &mut tables[i * width..i * width + blocks_of(context)] {
                *entry = free.pop().unwrap();
            }
            for (at, token) in (0..context).step_by(block_size).enumerate() {
                let len = block_size.min(context - token) as i64;
                let block = i64::from(tables[i * width + at]);
                for cache in [&k, &v] {
                    let mut part = cache.get(block).narrow(1, 0, len);
                    part.copy_(&Tensor::randn(part.size(), (Kind::Float, on)));
                }
            }
        }
        let tokens = i64::from(*starts.last().unwrap());
        let size = [tokens, heads.heads as i64, heads.head_dim as i64];
        let q = Tensor::randn(size, (Kind::Float, on)) * if soft_cap.is_some() { 3.0 } else { 1.0 };
        let contexts: Vec<i32> = lens.iter().map(|l| l.1 as i32).collect();
        Self {
            heads,
            kind,
            block_size,
            scores: Scores {
                scale: (heads.head_dim as f64).powf(-0.5),
                window,
                soft_cap,
            },
            q: q.to_kind(kind),
            k,
            v,
            block_tables: Tensor::from_slice(&tables)
                .view([lens.len() as i64, width as i64])
                .to_device(on),
            query_start: Tensor::from_slice(&starts).to_device(on),
            context_len: Tensor::from_slice(&contexts).to_device(on),
            lens,
        }
    }

    pub fn kv(&self) -> PagedKv<'_> {
        PagedKv {
            k: &self.k,
            v: &self.v,
            block_tables: &self.block_tables,
            query_start: &self.query_start,
            context_len: &self.context_len,
        }
    }

    pub fn poison(&self) -> Tensor {
        let size = [
            self.q.size()[0],
            (self.heads.heads * self.heads.head_dim) as i64,
        ];
        Tensor::full(size, f64::NAN, (self.kind, self.q.device()))
    }

    pub fn expected(&self) -> Tensor {
        let [h, kv_h, dim] =
            [self.heads.heads, self.heads.kv_heads, self.heads.head_dim].map(|n| n as i64);
        let size = [self.q.size()[0], h * dim];
        let out = Tensor::zeros(size, (Kind::Double, self.q.device()));
        let mut row = 0;
        for (i, &(new, context)) in self.lens.iter().enumerate() {
            let (new, context) = (new as i64, context as i64);
            if context > 0 {
                let blocks = (context as usize).div_ceil(self.block_size) as i64;
                let ids = self.block_tables.get(i as i64).narrow(0, 0, blocks);
                let gather = |cache: &Tensor| {
                    cache
                        .index_select(0, &ids)
                        .transpose(0, 1)
                        .reshape([kv_h, -1, dim])
                        .narrow(1, 0, context)
                        .to_kind(Kind::Double)
                        .repeat_interleave_self_int(h / kv_h, 0, None)
                };
                let q = self
                    .q
                    .narrow(0, row, new)
                    .transpose(0, 1)
                    .to_kind(Kind::Double);
                let mut s = q.matmul(&gather(&self.k).transpose(1, 2)) * self.scores.scale;
                if let Some(cap) = self.scores.soft_cap {
                    s = (s / cap).tanh() * cap;
                }
                let range = |from, to| Tensor::arange_start(from, to, (Kind::Int64, s.device()));
                let at = range(context - new, context).unsqueeze(1);
                let key = range(0, context).unsqueeze(0);
                let mut hidden = key.gt_tensor(&at);
                if let Some(window) = self.scores.window {
                    hidden = hidden.logical_or(&key.le_tensor(&(at - window as i64)));
                }
                let weights = s
                    .masked_fill(&hidden, f64::NEG_INFINITY)
                    .softmax(-1, Kind::Double);
                let result = weights.matmul(&gather(&self.v)).transpose(0, 1);
                out.narrow(0, row, new).copy_(&result.reshape([new, -1]));
            }
            row += new;
        }
        out
    }

    pub fn describe(&self) -> String {
        let Scores {
            window, soft_cap, ..
        } = self.scores;
        format!(
            "{:?} {:?} blocks of {} {:?} window {window:?} cap {soft_cap:?}",
            self.heads, self.kind, self.block_size, self.lens
        )
    }
}
