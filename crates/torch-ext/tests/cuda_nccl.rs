//! NCCL with one rank: all of the real path but the other ranks, eager and in a captured graph.
#![cfg(feature = "cuda")]

use tch::{Device, Kind, Tensor};
use torch_ext::cuda::{self, Graph, GraphPool, Nccl, NcclId, Stream};

const GPU: Device = Device::Cuda(0);

fn rank() -> Option<Nccl> {
    if !cuda::is_available() {
        println!("skipped: no CUDA device");
        return None;
    }
    Stream::new(0).unwrap().make_current().unwrap();
    Some(Nccl::new(NcclId::new().unwrap(), 0, 1, 0).unwrap())
}

fn random(size: &[i64], kind: Kind) -> Tensor {
    let x = Tensor::randn(size, (Kind::Float, GPU)) * 50.0;
    x.to_kind(kind)
}

const KINDS: [Kind; 5] = [
    Kind::BFloat16,
    Kind::Half,
    Kind::Float,
    Kind::Int,
    Kind::Int64,
];

#[test]
fn one_rank_exchanges_with_itself() {
    let Some(nccl) = rank() else { return };
    for kind in KINDS {
        for size in [&[1][..], &[7], &[3, 129], &[65, 4096]] {
            let x = random(size, kind);
            let mut sum = x.copy();
            nccl.all_reduce_sum(&mut sum).unwrap();
            assert!(sum.equal(&x), "{kind:?} {size:?}");
            let all = nccl.all_gather(&x).unwrap();
            assert!(all.equal(&x.unsqueeze(0)), "{kind:?} {size:?}");
            let mut told = x.copy();
            nccl.broadcast(&mut told, 0).unwrap();
            assert!(told.equal(&x), "{kind:?} {size:?}");
        }
    }
    // What does not fit is refused before NCCL sees it.
    let strided = random(&[4, 6], Kind::Float).transpose(0, 1);
    assert!(nccl.all_gather(&strided).is_err());
    assert!(
        nccl.all_gather(&Tensor::zeros([2], (Kind::Float, Device::Cpu)))
            .is_err()
    );
    assert!(nccl.broadcast(&mut random(&[2], Kind::Float), 1).is_err());
}

#[test]
fn exchanges_are_captured() {
    let Some(nccl) = rank() else { return };
    let x = random(&[33, 129], Kind::BFloat16);
    let record = |x: &Tensor| {
        // Work on the same stream before and behind each.
        let mut sum = x * 2.0;
        nccl.all_reduce_sum(&mut sum).unwrap();
        let all = nccl.all_gather(&(sum + 1.0)).unwrap();
        let mut told = all.squeeze_dim(0) * 3.0;
        nccl.broadcast(&mut told, 0).unwrap();
        told
    };
    let _ = record(&x);
    let (mut graph, told) = Graph::capture(GraphPool::new().unwrap(), || record(&x)).unwrap();
    let mut x = x;
    for _ in 0..3 {
        x.copy_(&random(&[33, 129], Kind::BFloat16));
        graph.replay().unwrap();
        cuda::synchronize(0).unwrap();
        assert!(told.equal(&(((&x * 2.0) + 1.0) * 3.0)));
    }
    // In this order: NCCL waits for graphs.
    drop(graph);
    drop(nccl);
}

#[test]
fn a_group_of_one_process() {
    let Some(_) = rank() else { return };
    let count = cuda::device_count();
    let devices: Vec<usize> = (0..count).collect();
    let group = Nccl::local_group(&devices).unwrap();
    assert_eq!(group.len(), count);
    // No GPU twice: an error, and nobody waits.
    assert!(Nccl::local_group(&[0, 0]).is_err());
}

#[test]
fn an_aborted_group_says_so() {
    let Some(nccl) = rank() else { return };
    nccl.abort_handle().abort();
    let error = nccl.all_reduce_sum(&mut random(&[8], Kind::Float));
    assert!(error.unwrap_err().to_string().contains("aborted"));
}
