//! Connecting the GPUs of a group of processes.

use tch::Tensor;
use torch_ext::cuda::NcclId;

use super::{Inner, World};
use crate::comm::{Collective, CommError, Members, Nccl, Solo};
use crate::parallel::{ParallelConfig, ParallelGroups};

impl World {
    /// As [`World::groups`], through NCCL: this rank has GPU `device` of this machine. Waits until
    /// all ranks have joined, at most for the timeout.
    pub fn gpu_groups(
        &self,
        parallel: &ParallelConfig,
        device: usize,
    ) -> Result<ParallelGroups, CommError> {
        let (rank, stages) = (self.rank(), parallel.pipeline_parallel_size);
        Ok(ParallelGroups {
            tp: match parallel.tensor_parallel_size {
                1 if stages > 1 => Box::new(Solo),
                _ => Box::new(self.nccl_group(parallel.tp_members(rank).0, device)?),
            },
            pp: match stages {
                1 => Box::new(Solo),
                _ => Box::new(self.nccl_group(parallel.pp_members(rank).0, device)?),
            },
        })
    }

    /// Joins the NCCL group of all ranks with GPU `device` of this machine. Waits until all have, at
    /// most for the timeout.
    pub fn nccl(&self, device: usize) -> Result<Nccl, CommError> {
        self.nccl_group((0..self.world_size()).collect(), device)
    }

    fn nccl_group(&self, members: Vec<usize>, device: usize) -> Result<Nccl, CommError> {
        let group = self.group(members.clone())?;
        let rank = group.rank();
        let mut bytes = [0; 128];
        if rank == 0 {
            let id = NcclId::new().map_err(|e| self.fail(e.to_string()))?;
            bytes = id.bytes();
        }
        let told = Tensor::from_slice(&bytes.map(i64::from));
        let told = group.broadcast(told, 0)?;
        let told = Vec::<i64>::try_from(told).map_err(|e| self.fail(e.to_string()))?;
        for (byte, told) in bytes.iter_mut().zip(told) {
            *byte = told as u8;
        }
        let id = NcclId::from_bytes(bytes);
        let members = Members::new(members, self.world_size());
        let Inner {
            timeout, health, ..
        } = &*self.0;
        Nccl::new(id, rank, members, device, *timeout, health)
    }
}
