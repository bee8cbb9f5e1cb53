//! The same sequences on the GPU and on the CPU.

use std::sync::Arc;

use rand::Rng;
use rand::rngs::StdRng;
use sampler::cuda::CudaSampler;
use sampler::{BatchSampler, SamplingParams};
use tch::{Device, Kind, Tensor};
use torch_ext::cuda::{self, Kernels, Stream};

use crate::common::assert_same;

/// Kernels of the first device, on a stream of this test's own.
pub(crate) fn kernels() -> Option<Arc<Kernels>> {
    if !cuda::is_available() {
        println!("skipped: no CUDA device");
        return None;
    }
    Stream::new(0).unwrap().make_current().unwrap();
    Some(Arc::new(Kernels::new(0).unwrap()))
}

pub(crate) const DEVICE: Device = Device::Cuda(0);

pub(crate) fn ints(values: &[i32]) -> Tensor {
    Tensor::from_slice(values).to_device(DEVICE)
}

pub(crate) fn host(tensor: &Tensor) -> Vec<i32> {
    Vec::<i32>::try_from(tensor.to_device(Device::Cpu)).unwrap()
}

/// The same sequences in both.
pub(crate) struct Pair {
    pub(crate) plain: BatchSampler,
    pub(crate) cuda: CudaSampler,
    pub(crate) vocab_size: usize,
}

impl Pair {
    pub(crate) fn new(kernels: &Arc<Kernels>, vocab_size: usize, slots: usize) -> Self {
        Self {
            plain: BatchSampler::with_threads(vocab_size, 4),
            cuda: CudaSampler::new(kernels.clone(), vocab_size, slots).unwrap(),
            vocab_size,
        }
    }

    pub(crate) fn admit(&mut self, slot: u32, params: SamplingParams, rng: &mut StdRng) {
        let tokens: Vec<u32> = (0..rng.random_range(1..100))
            .map(|_| rng.random_range(0..self.vocab_size as u32))
            .collect();
        let num_prompt = rng.random_range(0..=tokens.len());
        let (params, seed) = (Arc::new(params), rng.random());
        self.plain
            .admit(slot, params.clone(), seed, &tokens, num_prompt, &[0])
            .unwrap();
        self.cuda
            .admit(slot, params, seed, &tokens, num_prompt, &[0])
            .unwrap();
    }

    pub(crate) fn release(&mut self, slot: u32) {
        self.plain.release(slot);
        self.cuda.release(slot);
    }

    pub(crate) fn positions(&self, slots: &[u32]) -> Vec<i32> {
        let position = |&slot: &u32| self.plain.state(slot).map_or(0, |s| s.num_tokens() as i32);
        slots.iter().map(position).collect()
    }

    /// A step of rows of `slots` and of `padding` more. `gap` is what lies between two rows.
    pub(crate) fn step(
        &mut self,
        logits: &Tensor,
        slots: &[u32],
        padding: usize,
        gap: usize,
        what: &str,
    ) {
        let rows = slots.len();
        let width = (self.vocab_size + gap) as i64;
        let all = (rows + padding) as i64;
        let wide = Tensor::full([all, width], f64::NAN, (logits.kind(), DEVICE));
        let view = wide.narrow(1, 0, self.vocab_size as i64);
        view.narrow(0, 0, rows as i64).copy_(logits);
        let mut on_device: Vec<i32> = slots.iter().map(|&slot| slot as i32).collect();
        on_device.resize(rows + padding, -1);
        let mut positions = self.positions(slots);
        positions.resize(rows + padding, 0);
        let sampling = self
            .cuda
            .sample(&view, &ints(&on_device), &ints(&positions), slots)
            .unwrap();
        let tokens = host(sampling.tokens());
        let found = self.cuda.results(&sampling, &tokens[..rows]).unwrap();
        let flat = logits.to_device(Device::Cpu).to_kind(Kind::Float);
        let flat = Vec::<f32>::try_from(flat.reshape([-1])).unwrap();
        let expected = self.plain.sample(&flat, slots);
        assert_eq!(found.len(), expected.len());
        for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
            assert_same(found, expected, &format!("{what}, row {i}"));
        }
        assert!(tokens[rows..].iter().all(|&token| token == -1), "{what}");
    }
}
