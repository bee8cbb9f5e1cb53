//! Loading in several threads.

use std::panic::resume_unwind;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use torch_ext::cpu::{num_threads, set_num_threads};

use crate::error::ModelError;

/// Runs jobs `0..count`, as many at a time as this thread lets libtorch use threads; their results
/// in order, or the error of the first that failed.
///
/// Each thread works alone: splitting every block of a weight between threads instead would make
/// them wait for one another a thousand times, which takes seconds on a machine that is not idle.
pub(crate) fn in_parallel<T: Send>(
    count: usize,
    job: impl Fn(usize) -> Result<T, ModelError> + Sync,
) -> Result<Vec<T>, ModelError> {
    let (next, failed) = (AtomicUsize::new(0), AtomicBool::new(false));
    let work = || {
        set_num_threads(1);
        let _no_grad = tch::no_grad_guard();
        let mut results = Vec::new();
        while !failed.load(Ordering::Relaxed) {
            let index = next.fetch_add(1, Ordering::Relaxed);
            if index >= count {
                break;
            }
            let result = job(index);
            failed.fetch_or(result.is_err(), Ordering::Relaxed);
            results.push((index, result));
        }
        results
    };
    let threads = num_threads();
    let mut results = Vec::with_capacity(count);
    thread::scope(|scope| {
        let handles: Vec<_> = (0..threads.min(count)).map(|_| scope.spawn(work)).collect();
        for handle in handles {
            results.extend(handle.join().unwrap_or_else(|panic| resume_unwind(panic)));
        }
    });
    // What the workers set was also the default of threads yet to come.
    set_num_threads(threads);
    results.sort_by_key(|(index, _)| *index);
    results.into_iter().map(|(_, result)| result).collect()
}
