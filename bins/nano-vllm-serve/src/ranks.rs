//! This process among others: under torchrun, Slurm or anything else that sets `RANK`,
//! `WORLD_SIZE`, `MASTER_ADDR` and `MASTER_PORT`, every process is one rank of one model.

use std::io::{self, Write};
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use engine::{Health, Launcher, World};

use crate::args::EngineArgs;

/// How long the command may take to end by itself after another rank failed: open streams get
/// their error, files are closed. And then how long the process may take to end.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// Meets the other processes, if the environment says that there are any; else the other ranks are
/// threads, if there are any.
pub fn join(args: &mut EngineArgs) -> anyhow::Result<()> {
    let Some(launcher) = Launcher::from_env()? else {
        let health = Health::default();
        end_with(&health, "");
        args.health = Some(health);
        return Ok(());
    };
    args.config()?.check_world_size(launcher.world_size)?;
    let world = World::connect(&launcher, args.distributed_timeout)?;
    end_with(world.health(), &format!(" [rank {}]", launcher.rank));
    args.world = Some(world);
    Ok(())
}

/// Ends this process soon after a rank has failed, whatever the command waits for: requests, for
/// instance, or a thread that hangs in a driver.
fn end_with(health: &Health, who: &str) {
    let who = who.to_owned();
    health.on_failure(move |failure| {
        let failure = failure.clone();
        let exit = move || {
            // First, whatever comes: a driver that hangs may keep what ends with the process waiting, and nobody may be
            // there to read the message.
            let _ = thread::Builder::new().spawn(|| {
                thread::sleep(2 * LAST_WORDS);
                std::process::abort();
            });
            thread::sleep(LAST_WORDS);
            let _ = writeln!(io::stderr(), "nano-vllm-serve{who}: {failure}");
            std::process::exit(1);
        };
        if thread::Builder::new().spawn(exit).is_err() {
            std::process::exit(1);
        }
    });
}

/// Runs this process if it is not rank 0; returns rank 0's exit code.
pub fn follow(args: &EngineArgs) -> Option<anyhow::Result<ExitCode>> {
    args.world.as_ref().filter(|world| world.rank() > 0)?;
    // Any code but 0 to 255 cannot be, and means failure.
    let code = |code: i32| ExitCode::from(u8::try_from(code).unwrap_or(1));
    Some(args.follow().map(code))
}

/// The end of the command. On rank 0 it is what the other ranks exit with, and a failure if one of
/// them is.
pub fn finish(args: &EngineArgs, result: anyhow::Result<()>) -> anyhow::Result<()> {
    let Some(world) = &args.world else {
        return result;
    };
    let result = match (result, world.health().failure()) {
        // Whatever became of the requests, the work is not done.
        (Ok(()), Some(failure)) => Err(failure.into()),
        (result, _) => result,
    };
    world.finish(i32::from(result.is_err()));
    result
}
