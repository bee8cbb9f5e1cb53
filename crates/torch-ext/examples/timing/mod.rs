//! What the benches of products time with.

use std::error::Error;

use torch_ext::cuda::{Event, Graph, GraphPool, synchronize};

/// Median microseconds of `rounds` replays of a graph of what `record` does.
pub fn time<T>(rounds: usize, record: impl Fn() -> T) -> Result<f64, Box<dyn Error>> {
    drop(record()); // compiles, allocates
    synchronize(0)?;
    let (mut graph, _keep) = Graph::capture(GraphPool::new()?, record)?;
    let (start, end) = (Event::new(0, true)?, Event::new(0, true)?);
    let mut times = Vec::new();
    for _ in 0..rounds + 2 {
        start.record()?;
        graph.replay()?;
        end.record()?;
        end.synchronize()?;
        times.push(f64::from(end.since(&start)?) * 1e3);
    }
    times.drain(..2);
    times.sort_by(f64::total_cmp);
    Ok(times[rounds / 2])
}
