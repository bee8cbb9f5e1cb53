//! `nano-vllm-serve serve`, as its clients see it: the built program on a free port, and requests
//! over plain sockets.

mod bad_requests;
mod bench;
mod certificates;
mod client;
mod crashes;
mod dialect;
mod dropped;
mod endpoints;
mod fairness;
mod faults;
mod flags;
mod limits;
mod random_bodies;
mod ranks;
mod shutdown;
mod streams;
mod structured;
mod traces;
