//! Memory of the host on its way to a device.

use std::slice;

use tch::{Device, Kind, Tensor};

use super::CudaError;
use super::shim::shim;
use super::stream::{Event, copy_async};

/// Copies under way at a time.
const DEPTH: usize = 4;

/// Pinned buffers through which memory that is not pinned, such as a mapped file, goes to a device: while
/// copies are under way the host fills the next buffer. libtorch keeps such buffers for whoever is next.
#[derive(Debug)]
pub struct Staging {
    device: usize,
    buffers: Vec<(Tensor, Event)>,
    next: usize,
}

impl Staging {
    /// For a device.
    pub fn new(device: usize) -> Self {
        Self {
            device,
            buffers: Vec::new(),
            next: 0,
        }
    }

    /// Copies `pieces`, one behind the other, to `to`, a contiguous tensor on the device of as many bytes, in the
    /// order of the current stream. Has read them when it returns; the copy is done after [`finish`](Self::finish).
    pub fn send<'a>(
        &mut self,
        to: &Tensor,
        pieces: impl IntoIterator<Item = &'a [u8]>,
    ) -> Result<(), CudaError> {
        let bytes = to.numel() * to.kind().elt_size_in_bytes();
        if !to.is_contiguous() || to.device() != Device::Cuda(self.device) {
            let found = format!("strides {:?} on {:?}", to.stride(), to.device());
            return Err(CudaError(format!(
                "staging to a tensor that is not contiguous on GPU {}: {found}",
                self.device
            )));
        }
        if bytes == 0 {
            return match pieces.into_iter().all(<[u8]>::is_empty) {
                true => Ok(()),
                false => Err(CudaError("staging of more than 0 bytes".to_owned())),
            };
        }
        let host = self.buffer(bytes)?;
        // SAFETY: at least `bytes` bytes of host memory, which only this owns, and no copy reads any more.
        let mut room = unsafe { slice::from_raw_parts_mut(host.data_ptr().cast::<u8>(), bytes) };
        for piece in pieces {
            let Some((here, rest)) = room.split_at_mut_checked(piece.len()) else {
                return Err(CudaError(format!("staging of more than {bytes} bytes")));
            };
            here.copy_from_slice(piece);
            room = rest;
        }
        if !room.is_empty() {
            let missing = room.len();
            return Err(CudaError(format!(
                "staging: {missing} of {bytes} bytes are missing"
            )));
        }
        let host = host.narrow(0, 0, bytes as i64);
        copy_async(to, &host.view_dtype(to.kind()).view(&to.size()[..]))?;
        self.buffers[self.next].1.record()?;
        self.next = (self.next + 1) % DEPTH;
        Ok(())
    }

    /// The next buffer, of at least `bytes` bytes, when its last copy is done.
    fn buffer(&mut self, bytes: usize) -> Result<Tensor, CudaError> {
        if self.buffers.len() == self.next {
            let made = (uninitialized(bytes)?, Event::new(self.device, false)?);
            self.buffers.push(made);
        }
        let (host, done) = &mut self.buffers[self.next];
        done.synchronize()?;
        if host.numel() < bytes {
            *host = uninitialized(bytes)?;
        }
        Ok(host.shallow_clone())
    }

    /// Waits for all copies.
    pub fn finish(&self) -> Result<(), CudaError> {
        self.buffers
            .iter()
            .try_for_each(|(_, done)| done.synchronize())
    }
}

/// Pinned bytes.
fn uninitialized(bytes: usize) -> Result<Tensor, CudaError> {
    let host = Tensor::f_empty([bytes as i64], (Kind::Uint8, Device::Cpu));
    let mut host = host.map_err(|e| CudaError(e.to_string()))?;
    // SAFETY: a live tensor, which the function replaces by a pinned one.
    unsafe { shim()?.pin(host.as_mut_ptr().cast(), 0)? };
    Ok(host)
}
