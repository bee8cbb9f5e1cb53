//! Masks of allowed tokens on their way to the device.

use batch_scheduler::SampleMask;
use sampler::torch::masked_logits;
use tch::Tensor;
use torch_ext::cuda::Upload;

use super::{CudaRunner, UPLOADS};

/// Where masks are uploaded. Made when there is a first one: few engines ever see any.
#[derive(Debug)]
pub(super) struct Masks {
    upload: Upload,
    /// 32-bit words of a mask.
    width: usize,
    /// What is sent: the rows, then their words.
    ints: Vec<i32>,
}

impl CudaRunner {
    /// `logits` with `masks` applied, in stream order after whatever writes `logits` and before
    /// whatever reads the copy; `None` if there are none. The copy of the masks to the device waits
    /// for nothing, and a later step's does not overwrite it before this one has read it.
    pub(super) fn masked(
        &mut self,
        logits: &Tensor,
        masks: &[SampleMask],
    ) -> Result<Option<Tensor>, String> {
        if masks.is_empty() {
            return Ok(None);
        }
        let text = |e: torch_ext::cuda::CudaError| e.to_string();
        let room = match &mut self.masks {
            Some(room) => room,
            room @ None => {
                let tch::Device::Cuda(index) = self.model.device() else {
                    return Err("the model left the GPU".to_owned());
                };
                let width = self.model.config().vocab_size.div_ceil(32);
                let capacity = self.config.max_num_seqs * (width + 1);
                room.insert(Masks {
                    upload: Upload::new(capacity, UPLOADS, index).map_err(text)?,
                    width,
                    ints: Vec::new(),
                })
            }
        };
        let (count, width) = (masks.len(), room.width);
        room.ints.clear();
        room.ints
            .extend(masks.iter().map(|mask| mask.sample as i32));
        for (at, mask) in masks.iter().enumerate() {
            let words = mask.allowed.iter().take(width);
            room.ints.extend(words.map(|word| word.cast_signed()));
            room.ints.resize(count + (at + 1) * width, 0);
        }
        room.upload.send(&room.ints).map_err(text)?;
        let (count, width) = (count as i64, width as i64);
        let sent = &room.upload.device;
        let words = sent.narrow(0, count, count * width).view([count, width]);
        masked_logits(logits, &sent.narrow(0, 0, count), &words)
            .map(Some)
            .map_err(|e| e.to_string())
    }
}
