//! What the benches of products time with.
#![allow(dead_code)] // each uses its part

use std::error::Error;

use torch_ext::cuda::{Event, Graph, GraphPool, synchronize};

/// Median microseconds of `rounds` replays of a graph of what `record` does.
pub fn time<T>(rounds: usize, record: impl Fn() -> T) -> Result<f64, Box<dyn Error>> {
    let [median] = times(rounds, [&|| drop(record())])?;
    Ok(median)
}

/// The same for several, a replay of each in turn: what the machine does meanwhile (a lower clock, once it is warm) happens
/// to all of them.
pub fn times<const N: usize>(
    rounds: usize,
    records: [&dyn Fn(); N],
) -> Result<[f64; N], Box<dyn Error>> {
    let mut graphs = Vec::new();
    for record in records {
        record(); // compiles, allocates
        synchronize(0)?;
        graphs.push(Graph::capture(GraphPool::new()?, record)?.0);
    }
    let (start, end) = (Event::new(0, true)?, Event::new(0, true)?);
    let mut taken = [(); N].map(|()| Vec::new());
    for _ in 0..rounds + 2 {
        for (graph, taken) in graphs.iter_mut().zip(&mut taken) {
            start.record()?;
            graph.replay()?;
            end.record()?;
            end.synchronize()?;
            taken.push(f64::from(end.since(&start)?) * 1e3);
        }
    }
    Ok(taken.map(|mut taken| {
        taken.drain(..2);
        taken.sort_by(f64::total_cmp);
        taken[rounds / 2]
    }))
}
