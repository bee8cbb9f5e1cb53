//! What a rank other than 0 does.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::{Duration, Instant};

use super::outputs::OutputLine;
use super::world::{Order, World};
use crate::comm::CommError;
use crate::error::RunnerError;
use crate::model::Model;
use crate::runner::{Runner, panic_text};

/// As [`follow`], on a thread of rank 0's process: takes part in each of `steps` until there are no
/// more.
pub(super) fn follow_line(
    runner: &mut Runner,
    steps: &Receiver<Arc<[u8]>>,
    outputs: Option<&OutputLine>,
) -> Result<(), RunnerError> {
    while let Some(next) = next(steps, Some(runner))? {
        let output = match next {
            Next::Told(step) => runner.follow(&step)?,
            Next::Finished(output) => Some(output),
        };
        if let (Some(output), Some(line)) = (output, outputs)
            && line.send(Ok(output)).is_err()
        {
            // Rank 0 is gone, and with it whoever would give orders.
            return Ok(());
        }
    }
    Ok(())
}

/// What a follower does next.
enum Next<T> {
    /// What rank 0 says.
    Told(T),
    /// Give rank 0 the output of an earlier step, which a GPU has finished.
    Finished(Vec<u8>),
}

/// How long a follower looks for both without rest.
pub(super) const BUSY: Duration = Duration::from_millis(20);
pub(super) const REST: Duration = Duration::from_micros(50);

/// The next word of rank 0, or the next output that `runner` owes it, whichever comes first; `None`
/// once rank 0 says no more.
fn next<T>(
    told: &Receiver<T>,
    mut runner: Option<&mut Runner>,
) -> Result<Option<Next<T>>, RunnerError> {
    let start = Instant::now();
    loop {
        let Some(runner) = runner.as_mut().filter(|runner| runner.owes()) else {
            return Ok(told.recv().ok().map(Next::Told));
        };
        match told.try_recv() {
            Ok(word) => return Ok(Some(Next::Told(word))),
            Err(TryRecvError::Disconnected) => return Ok(None),
            Err(TryRecvError::Empty) => {}
        }
        if let Some(output) = runner.finished()? {
            return Ok(Some(Next::Finished(output)));
        }
        match start.elapsed() > BUSY {
            true => std::thread::sleep(REST),
            false => std::thread::yield_now(),
        }
    }
}

/// Runs this process's rank until rank 0 ends the work; returns the code to exit with. `model` is
/// this rank's share.
pub fn follow(world: &World, model: Model) -> Result<i32, CommError> {
    let mut model = Some(model);
    let mut runner: Option<Runner> = None;
    let orders = world.orders()?;
    let failed = |error: RunnerError| match error {
        RunnerError::Comm { source, .. } => source,
        error => world.fail(error.to_string()),
    };
    loop {
        let order = match next(&orders, runner.as_mut()).map_err(failed)? {
            Some(Next::Told(order)) => order?,
            Some(Next::Finished(output)) => {
                world.send_output(&output)?;
                continue;
            }
            None => return Err(world.fail("hears nothing of rank 0 any more".to_owned())),
        };
        match order {
            Order::Bye(code) => return Ok(code),
            Order::Configure(config) => {
                let Some(model) = model.take() else {
                    return Err(world.fail("was given sizes twice".to_owned()));
                };
                // Rank 0 makes its own meanwhile, and GPUs exchange something in doing so.
                let on_cpu = model.device() == tch::Device::Cpu;
                if !on_cpu {
                    world.ready()?;
                }
                let made = Runner::new(model, &config);
                runner = Some(made.map_err(|e| world.fail(e.to_string()))?);
                if on_cpu {
                    world.ready()?;
                }
            }
            Order::Measure(config) => {
                let loaded = model.take();
                let device = loaded.as_ref().map(Model::device);
                let (Some(loaded), Some(tch::Device::Cuda(device))) = (loaded, device) else {
                    return Err(world.fail("was asked for the memory of a GPU".to_owned()));
                };
                let measured = Runner::measure(loaded, device, &config);
                let (loaded, memory, work) = measured.map_err(|e| world.fail(e.to_string()))?;
                model = Some(loaded);
                world.measured(memory, work)?;
            }
            Order::Step(step) => {
                let Some(runner) = &mut runner else {
                    return Err(world.fail("was given a step before its sizes".to_owned()));
                };
                let done = catch_unwind(AssertUnwindSafe(|| runner.follow(&step)));
                match done {
                    Ok(Ok(None)) => {}
                    Ok(Ok(Some(output))) => world.send_output(&output)?,
                    Ok(Err(error)) => return Err(failed(error)),
                    Err(panic) => return Err(world.fail(panic_text(panic.as_ref()))),
                }
            }
        }
    }
}
