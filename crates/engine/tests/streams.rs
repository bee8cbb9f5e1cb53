//! The rules of the asynchronous engine, on a fake model.

mod common;

use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

use common::*;
use engine::{
    AsyncEngine, AsyncOptions, FinishReason, OutputDelta, RequestError, SamplingParams, StepRecord,
    StopReason,
};
use tokio::runtime::{Builder, Runtime};

fn runtime() -> Runtime {
    Builder::new_current_thread().enable_time().build().unwrap()
}

fn start(setup: &Setup) -> AsyncEngine {
    AsyncEngine::start(setup.core(), setup.frontend()).unwrap()
}

/// An engine each of whose steps waits for a permit. Dropping the sender lets it run.
fn gated(setup: &Setup) -> (AsyncEngine, Sender<()>) {
    let (permits, gate) = channel();
    let mut runner = setup.runner();
    runner.permits = Some(gate);
    let engine = AsyncEngine::start(setup.core_with(runner), setup.frontend()).unwrap();
    (engine, permits)
}

/// The answer to a question that is put between two steps: lets one step after the other pass until
/// it is there. A permit alone may be used up before the question has reached the engine.
async fn answer<T>(permits: &Sender<()>, question: impl Future<Output = T>) -> T {
    tokio::pin!(question);
    loop {
        match tokio::time::timeout(Duration::from_millis(1), &mut question).await {
            Ok(answer) => return answer,
            Err(_) => permits.send(()).unwrap(),
        }
    }
}

/// Waits until no sequence is left; panics if blocks leaked or that takes too long.
async fn wait_until_empty(engine: &AsyncEngine) {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let stats = engine.stats().await.unwrap();
        if (stats.running, stats.waiting, stats.steps_in_flight) == (0, 0, 0) {
            assert_eq!(stats.kv_used_blocks, 0, "blocks leaked");
            return;
        }
        assert!(Instant::now() < deadline, "never empty: {stats:?}");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

#[test]
fn deltas_add_up_to_the_output() {
    for overlap in [false, true] {
        let setup = Setup {
            mode: Mode::Hash,
            overlap,
            ..Setup::default()
        };
        let engine = start(&setup);
        runtime().block_on(async {
            let params = SamplingParams {
                n: 3,
                seed: Some(1),
                max_tokens: Some(30),
                logprobs: Some(0),
                ..SamplingParams::default()
            };
            let mut stream = engine.generate(request("prompt", params.clone())).unwrap();
            let mut texts = vec![String::new(); 3];
            let mut tokens = vec![Vec::new(); 3];
            let mut logprobs = [0; 3];
            let mut ended = 0;
            while let Some(delta) = stream.next().await {
                let OutputDelta {
                    index,
                    text,
                    token_ids,
                    logprobs: entries,
                    finish,
                } = delta.unwrap();
                let index = index as usize;
                texts[index].push_str(&text);
                tokens[index].extend(token_ids);
                logprobs[index] += entries.len();
                ended += usize::from(finish.is_some());
            }
            assert_eq!((ended, logprobs), (3, [30; 3]));
            let whole = setup
                .engine()
                .generate(vec![request("prompt", params)])
                .remove(0);
            for (index, seq) in whole.unwrap().outputs.iter().enumerate() {
                assert_eq!((&texts[index], &tokens[index]), (&seq.text, &seq.token_ids));
                assert_eq!(stream.output().outputs[index].text, seq.text);
            }
            wait_until_empty(&engine).await;
        });
    }
}

#[test]
fn many_streams_on_many_threads_get_what_each_gets_alone() {
    let setup = Setup {
        mode: Mode::Hash,
        overlap: true,
        blocks: 40,
        ..Setup::default()
    };
    let engine = start(&setup);
    let prompt = |at: usize| "a common beginning, then ".repeat(1 + at % 2) + &at.to_string();
    let params = |at: usize| SamplingParams {
        seed: Some(at as u64),
        max_tokens: Some(20),
        ..SamplingParams::default()
    };
    let threads: Vec<_> = (0..16)
        .map(|at| {
            let engine = engine.clone();
            let request = request(prompt(at), params(at));
            std::thread::spawn(move || engine.generate(request).unwrap().blocking_collect())
        })
        .collect();
    for (at, thread) in threads.into_iter().enumerate() {
        let together = thread.join().unwrap().unwrap();
        let alone = setup
            .engine()
            .generate(vec![request(prompt(at), params(at))]);
        assert_eq!(together.outputs, alone[0].as_ref().unwrap().outputs);
    }
    runtime().block_on(wait_until_empty(&engine));
}

#[test]
fn a_stop_string_ends_the_sequence_in_the_core_too() {
    let setup = Setup::default();
    let engine = start(&setup);
    runtime().block_on(async {
        let params = SamplingParams {
            stop: vec!["gh".to_string()],
            ..greedy(150)
        };
        let output = engine
            .generate(request("abc", params))
            .unwrap()
            .collect()
            .await
            .unwrap();
        let seq = &output.outputs[0];
        assert_eq!((seq.text.as_str(), seq.token_ids.len()), ("def", 5));
        let finish = seq.finish.as_ref().unwrap();
        assert_eq!(finish.reason, FinishReason::Stop);
        assert_eq!(finish.stop_reason, Some(StopReason::Text("gh".to_string())));
        wait_until_empty(&engine).await;
    });
}

#[test]
fn a_dropped_stream_gives_its_blocks_back_at_every_state() {
    for overlap in [false, true] {
        for after in 0..10 {
            let setup = Setup {
                overlap,
                max_num_batched_tokens: 8,
                ..Setup::default()
            };
            let (engine, permits) = gated(&setup);
            let params = SamplingParams {
                n: 2,
                max_tokens: Some(150),
                ..SamplingParams::default()
            };
            let stream = engine
                .generate(request("a prompt of some chunks", params))
                .unwrap();
            for _ in 0..after {
                permits.send(()).unwrap();
            }
            drop(stream);
            drop(permits);
            runtime().block_on(async {
                wait_until_empty(&engine).await;
                let steps = engine.stats().await.unwrap().totals.steps;
                assert!(steps < 100, "{steps} steps: it ran to its end");
                let next = engine.generate(request("abc", greedy(3))).unwrap();
                assert_eq!(next.collect().await.unwrap().outputs[0].text, "def");
            });
        }
    }
}

#[test]
fn a_dropped_stream_s_blocks_are_free_within_two_steps() {
    for overlap in [false, true] {
        for in_its_prompt in [true, false] {
            let setup = Setup {
                overlap,
                max_num_batched_tokens: 8,
                prefix_caching: false,
                ..Setup::default()
            };
            let (permits, gate) = channel();
            let mut runner = setup.runner();
            runner.permits = Some(gate);
            let (told, figures) = channel();
            let options = AsyncOptions {
                observer: Some(Box::new(move |stats, _| {
                    let _ = told.send(*stats);
                })),
                ..AsyncOptions::default()
            };
            let core = setup.core_with(runner);
            let engine = AsyncEngine::start_with(core, setup.frontend(), options).unwrap();
            // A step of the engine: its figures come once it has been launched and, with overlap, the
            // one before was collected.
            let mut steps = 0;
            let mut used_after_step = || {
                steps += 1;
                permits.send(()).unwrap();
                (figures.recv().unwrap().kv_used_blocks, steps)
            };
            let stays = engine.generate(request("abc", greedy(150))).unwrap();
            // The figures of the request's arrival.
            figures.recv().unwrap();
            let own = (0..3).map(|_| used_after_step().0).last().unwrap();
            let prompt = "a prompt of many chunks, each of which takes a step of its own";
            let leaves = engine.generate(request(prompt, greedy(100))).unwrap();
            let full = own + prompt.len().div_ceil(setup.block_size);
            // Admission takes the whole prompt's blocks, and its first step computes a part of it.
            while used_after_step().0 < full {}
            if !in_its_prompt {
                for _ in 0..prompt.len() / 4 {
                    used_after_step();
                }
            }
            drop(leaves);
            used_after_step();
            let (after, steps) = used_after_step();
            // The one that stays has got a token a step.
            let most = own + steps / setup.block_size + 1;
            assert!(most < full, "too many steps to tell");
            assert!(
                after <= most,
                "{after} blocks; at most {most} are of the one that stays"
            );
            drop((stays, permits));
            runtime().block_on(wait_until_empty(&engine));
        }
    }
}

#[test]
fn bad_requests_are_refused_and_broken_sequences_end_alone() {
    let engine = start(&Setup::default());
    runtime().block_on(async {
        let refused = engine.generate(request("", greedy(1)));
        assert_eq!(refused.err(), Some(RequestError::EmptyPrompt));
        let broken = engine.generate(request("wow!", greedy(5))).unwrap();
        let fine = engine.generate(request("abc", greedy(5))).unwrap();
        let error = broken.collect().await.unwrap_err();
        assert!(matches!(error, RequestError::Failed(_)), "{error}");
        assert_eq!(fine.collect().await.unwrap().outputs[0].text, "defgh");
        wait_until_empty(&engine).await;
    });
}

#[test]
fn death_ends_every_open_stream_with_its_cause() {
    for panics in [false, true] {
        let setup = Setup::default();
        let mut runner = setup.runner();
        match panics {
            true => runner.panic_at = Some(4),
            false => runner.fail_at = Some(4),
        }
        let engine = AsyncEngine::start(setup.core_with(runner), setup.frontend()).unwrap();
        runtime().block_on(async {
            let streams: Vec<_> = ["abc", "xyz"]
                .map(|prompt| engine.generate(request(prompt, greedy(100))))
                .into_iter()
                .collect();
            let expected = match panics {
                true => "the engine has stopped: it failed unexpectedly, its log says more",
                false => "the engine has stopped: the device is lost in step 4",
            };
            for stream in streams {
                // The engine may be dead before the second request reaches it.
                let error = match stream {
                    Ok(stream) => stream.collect().await.unwrap_err(),
                    Err(error) => error,
                };
                assert_eq!(error.to_string(), expected);
            }
            let late = engine.generate(request("abc", greedy(1)));
            let late = match late {
                Ok(stream) => stream.collect().await.unwrap_err(),
                Err(error) => error,
            };
            assert_eq!(late.to_string(), expected);
            assert!(engine.stats().await.is_err());
            // Says so to whoever waits for it, also after a panic.
            let cause = engine.stopped().await;
            assert!(expected.ends_with(&cause), "{cause}");
            assert_eq!(engine.stop_cause(), Some(cause.as_str()));
            engine.shutdown(true).await;
        });
    }
}

#[test]
fn shutdown_drains_or_aborts_and_refuses_what_comes_later() {
    for drain in [true, false] {
        let (engine, permits) = gated(&Setup::default());
        runtime().block_on(async {
            let stream = engine.generate(request("abc", greedy(20))).unwrap();
            permits.send(()).unwrap();
            let handle = engine.clone();
            let leaving = std::thread::spawn(move || {
                runtime().block_on(handle.shutdown(drain));
            });
            // The thread has the command before the gate opens, or takes it between two steps.
            std::thread::sleep(Duration::from_millis(20));
            drop(permits);
            let output = stream.collect().await.unwrap();
            leaving.join().unwrap();
            let reason = output.outputs[0].finish_reason().unwrap();
            match drain {
                true => assert_eq!(output.outputs[0].text.len(), 20),
                false => assert!(matches!(reason, FinishReason::Abort | FinishReason::Length)),
            }
            let late = match engine.generate(request("abc", greedy(1))) {
                Ok(stream) => stream.collect().await.unwrap_err(),
                Err(error) => error,
            };
            assert_eq!(late.to_string(), "the engine has stopped: it was shut down");
            assert_eq!(engine.stop_cause(), Some("it was shut down"));
        });
    }
}

#[test]
fn snapshots_show_shared_prefix_blocks() {
    let (engine, permits) = gated(&Setup::default());
    let prompt = "sixteen and more letters";
    runtime().block_on(async {
        let first = engine.generate(request(prompt, greedy(100))).unwrap();
        // The prompt is published once a step that computes it was collected.
        while answer(&permits, engine.stats()).await.unwrap().totals.steps < 2 {}
        let second = engine.generate(request(prompt, greedy(100))).unwrap();
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            let snapshot = answer(&permits, engine.kv_snapshot()).await.unwrap();
            if snapshot.sequences.len() == 2 && snapshot.num_shared() >= 4 {
                break;
            }
            assert!(Instant::now() < deadline, "no shared blocks: {snapshot:?}");
        }
        // Steps are told from the first look on: the third prefills, the others decode.
        assert!(
            answer(&permits, engine.look())
                .await
                .unwrap()
                .steps
                .is_empty()
        );
        let third = engine.generate(request("other", greedy(100))).unwrap();
        loop {
            let look = answer(&permits, engine.look()).await.unwrap();
            let prefills = |step: &&StepRecord| step.rows.iter().any(|row| !row.decode);
            if let Some(step) = look.steps.iter().find(prefills) {
                let rows: Vec<_> = step.rows.iter().map(|r| (r.len, r.decode)).collect();
                assert_eq!(rows, [(1, true), (1, true), (5, false)], "{:?}", look.steps);
                break;
            }
            assert!(Instant::now() < deadline, "nobody prefills: {look:?}");
        }
        drop((first, second, third, permits));
        wait_until_empty(&engine).await;
    });
}
