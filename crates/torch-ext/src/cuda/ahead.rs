//! Compiling kernels before they are needed, several at a time.

use std::collections::{HashMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::Builder;

use super::CudaError;
use super::compile::{Source, compiled};

/// A program: its source's name, and what it is compiled with.
pub(super) type Program = (&'static str, Vec<String>);
type Code = Result<Vec<u8>, CudaError>;

/// Programs that are being compiled, by as many threads as the machine runs at a time.
#[derive(Debug, Default)]
pub(super) struct Ahead(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    jobs: Mutex<Jobs>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Jobs {
    waiting: VecDeque<(&'static Source, Program, String)>,
    /// `None` while a program waits or is compiled.
    code: HashMap<Program, Option<Code>>,
    workers: usize,
}

impl Shared {
    /// A panic while the lock was held cannot leave half an entry: keep going.
    fn lock(&self) -> MutexGuard<'_, Jobs> {
        self.jobs.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn work(&self) {
        loop {
            let mut jobs = self.lock();
            let Some((source, program, arch)) = jobs.waiting.pop_front() else {
                jobs.workers -= 1;
                self.changed.notify_all();
                return;
            };
            drop(jobs);
            let code = catch_unwind(AssertUnwindSafe(|| compiled(source, &program.1, &arch)));
            let code = code.unwrap_or_else(|_| {
                let what = format!("{}: the compiler panicked", source.name);
                Err(CudaError(what))
            });
            self.lock().code.insert(program, Some(code));
            self.changed.notify_all();
        }
    }
}

impl Ahead {
    /// Has `source` compiled with `defines`, unless it is on its way.
    pub(super) fn start(&self, source: &'static Source, defines: Vec<String>, arch: &str) {
        let program = (source.name, defines);
        let mut jobs = self.0.lock();
        if jobs.code.contains_key(&program) {
            return;
        }
        jobs.code.insert(program.clone(), None);
        jobs.waiting.push_back((source, program, arch.to_owned()));
        if jobs.workers < std::thread::available_parallelism().map_or(1, |n| n.get()) {
            let shared = self.0.clone();
            // Without a thread the program waits, and whoever takes it compiles it.
            let started = Builder::new().spawn(move || shared.work());
            jobs.workers += usize::from(started.is_ok());
        }
    }

    /// A program's code, when it is there; `None` if nobody is at it: the caller is to compile it.
    pub(super) fn take(&self, program: &Program) -> Option<Code> {
        let mut jobs = self.0.lock();
        jobs.code.get(program)?;
        if let Some(at) = jobs.waiting.iter().position(|job| job.1 == *program) {
            jobs.waiting.remove(at);
            jobs.code.remove(program);
            return None;
        }
        while let Some(None) = jobs.code.get(program) {
            let woken = self.0.changed.wait(jobs);
            jobs = woken.unwrap_or_else(|e| e.into_inner());
        }
        jobs.code.remove(program).flatten()
    }

    /// Waits until nothing is being compiled.
    pub(super) fn finish(&self) {
        let mut jobs = self.0.lock();
        while jobs.workers > 0 {
            let woken = self.0.changed.wait(jobs);
            jobs = woken.unwrap_or_else(|e| e.into_inner());
        }
    }
}

impl Drop for Ahead {
    /// The compiler must not be at work when the process ends and takes it apart.
    fn drop(&mut self) {
        self.0.lock().waiting.clear();
        self.finish();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    static SOURCE: Source = Source {
        name: "ahead",
        text: "extern \"C\" __global__ void f(int *x) { *x = N; }",
        variants: &[],
    };

    fn defines(n: usize) -> Vec<String> {
        vec![format!("N={n}")]
    }

    /// Without NVRTC the code is an error, which is handed on in the same way.
    #[test]
    fn every_program_is_handed_out_once() {
        let ahead = Ahead::default();
        for n in (0..40).chain(0..40) {
            ahead.start(&SOURCE, defines(n), "sm_90a");
        }
        for n in (0..40).rev() {
            let code = ahead.take(&("ahead", defines(n)));
            match code {
                Some(Ok(code)) => assert!(!code.is_empty()),
                Some(Err(e)) => assert!(e.0.contains("NVRTC"), "{e}"),
                None => {}
            }
            assert!(ahead.take(&("ahead", defines(n))).is_none());
        }
        ahead.finish();
        assert_eq!(ahead.0.lock().workers, 0);
        assert!(ahead.0.lock().code.is_empty());
    }

    #[test]
    fn what_nobody_asks_for_does_not_outlive_it() {
        let ahead = Ahead::default();
        let shared = ahead.0.clone();
        for n in 100..140 {
            ahead.start(&SOURCE, defines(n), "sm_90a");
        }
        drop(ahead);
        let jobs = shared.lock();
        assert!(jobs.workers == 0 && jobs.waiting.is_empty());
    }
}
