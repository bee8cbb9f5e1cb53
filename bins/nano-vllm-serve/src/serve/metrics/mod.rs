//! Prometheus metrics under vLLM's names, types and labels.

mod buckets;
pub mod classic;
mod http;
mod process;
mod register;
mod tenants;

use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};

use batch_scheduler::{StepStats, Totals};
use engine::{FinishReason, RequestOutput, Stats};
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use self::http::HttpMetrics;
use self::tenants::TenantMetrics;
use super::auth::TenantId;

type Label = [(&'static str, &'static str); 1];

/// Why a request was not taken.
#[derive(Clone, Copy, Debug)]
pub enum Rejection {
    /// The queue was full.
    QueueFull,
    /// It waited longer than --queue-timeout.
    QueueTimeout,
    /// The server was shutting down.
    ShuttingDown,
}

/// Handles on every metric. Cheap to update: no name or label is looked up.
pub struct Metrics {
    registry: Registry,
    running: Gauge,
    waiting: Gauge,
    waiting_for_capacity: Gauge,
    kv_usage: Gauge<f64, AtomicU64>,
    preemptions: Counter,
    prefix_queries: Counter,
    prefix_hits: Counter,
    iteration_tokens: Histogram,
    prompt_tokens: Counter,
    prompt_tokens_cached: Counter,
    generation_tokens: Counter,
    pub first_token: Histogram,
    pub inter_token: Histogram,
    pub e2e: Histogram,
    pub queue_time: Histogram,
    pub prefill_time: Histogram,
    pub decode_time: Histogram,
    pub inference_time: Histogram,
    pub time_per_output_token: Histogram,
    pub request_prompt_tokens: Histogram,
    pub request_generation_tokens: Histogram,
    pub request_max_generation_tokens: Histogram,
    pub request_params_max_tokens: Histogram,
    pub request_params_n: Histogram,
    pub request_preemptions: Histogram,
    pub request_prefill_computed: Histogram,
    pub http: Arc<HttpMetrics>,
    /// By tenant; empty if no key is needed.
    tenants: Vec<TenantMetrics>,
    success: Family<Label, Counter>,
    rejections: Family<Label, Counter>,
    /// Requests given up after --request-timeout; `success` has them under "abort" with all others
    /// that were not waited for.
    pub request_timeouts: Counter,
    /// The engine's totals at the last step: counters grow by the difference.
    seen: Mutex<Stats>,
}

/// Figures before anything has happened.
fn nothing() -> Stats {
    Stats {
        running: 0,
        waiting: 0,
        steps_in_flight: 0,
        kv_used_blocks: 0,
        kv_total_blocks: 0,
        last_step: StepStats::default(),
        totals: Totals::default(),
    }
}

impl Metrics {
    /// A step has ended.
    pub fn on_step(&self, stats: &Stats) {
        let gauge = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
        self.running.set(gauge(stats.running));
        self.waiting.set(gauge(stats.waiting));
        self.waiting_for_capacity.set(gauge(stats.waiting));
        self.kv_usage.set(stats.kv_usage());
        let Ok(mut seen) = self.seen.lock() else {
            return;
        };
        let (now, before) = (&stats.totals, &seen.totals);
        self.preemptions
            .inc_by(now.preemptions - before.preemptions);
        self.prefix_queries
            .inc_by(now.prefix_queries - before.prefix_queries);
        self.prefix_hits
            .inc_by(now.prefix_hits - before.prefix_hits);
        if now.steps > before.steps {
            let tokens = now.prefill_tokens + now.decode_tokens;
            let earlier = before.prefill_tokens + before.decode_tokens;
            self.iteration_tokens.observe((tokens - earlier) as f64);
        }
        *seen = *stats;
    }

    /// A request has ended.
    pub fn on_end(&self, reason: FinishReason) {
        self.success
            .get_or_create(&[("finished_reason", reason.as_str())])
            .inc();
    }

    /// A prompt was handed to the engine.
    pub fn on_start(&self, tenant: TenantId) {
        if let Some(own) = self.tenants.get(tenant.0 as usize) {
            own.requests.inc();
        }
    }

    /// A prompt has got its first token.
    pub fn on_prompt(&self, tenant: TenantId, output: &RequestOutput) {
        let tokens = output.prompt_token_ids.len() as u64;
        self.prompt_tokens.inc_by(tokens);
        self.prompt_tokens_cached
            .inc_by(u64::from(output.metrics.num_cached_tokens));
        if let Some(own) = self.tenants.get(tenant.0 as usize) {
            own.prompt_tokens.inc_by(tokens);
            if let Some(time) = output.metrics.queue_time {
                own.queue_time.observe(time.as_secs_f64());
            }
        }
    }

    /// Tokens were generated.
    pub fn on_tokens(&self, tenant: TenantId, tokens: usize) {
        self.generation_tokens.inc_by(tokens as u64);
        if let Some(own) = self.tenants.get(tenant.0 as usize) {
            own.generation_tokens.inc_by(tokens as u64);
        }
    }

    /// A request was not taken.
    pub fn on_rejection(&self, tenant: TenantId, rejection: Rejection) {
        if let Some(own) = self.tenants.get(tenant.0 as usize) {
            own.rejections.inc();
        }
        let reason = match rejection {
            Rejection::QueueFull => "queue_full",
            Rejection::QueueTimeout => "queue_timeout",
            Rejection::ShuttingDown => "shutting_down",
        };
        self.rejections.get_or_create(&[("reason", reason)]).inc();
    }

    /// What routers weigh servers by, with the names that vLLM gives it there.
    pub fn load(&self) -> [(&'static str, f64); 2] {
        [
            ("kv_cache_usage_perc", self.kv_usage.get()),
            ("num_requests_waiting", self.waiting.get() as f64),
        ]
    }

    /// Everything in OpenMetrics' text format.
    pub fn text(&self) -> String {
        let mut text = String::new();
        // Writing to a string cannot fail.
        let _ = encode(&mut text, &self.registry);
        text
    }
}

#[cfg(test)]
mod tests {
    use super::buckets::token_buckets;
    use super::*;

    #[test]
    fn counters_grow_by_what_the_engine_did() {
        let metrics = Metrics::new("m", 1000, vec![("block_size".into(), "16".into())], &[]);
        let mut stats = nothing();
        (stats.running, stats.waiting) = (3, 2);
        (stats.kv_used_blocks, stats.kv_total_blocks) = (1, 4);
        (stats.totals.steps, stats.totals.prefill_tokens) = (1, 9);
        metrics.on_step(&stats);
        metrics.on_step(&stats);
        metrics.on_end(FinishReason::Length);
        metrics.on_rejection(TenantId::default(), Rejection::QueueFull);
        let text = metrics.text();
        let labels = r#"{model_name="m",engine="0""#;
        for line in [
            format!("vllm:num_requests_running{labels}}} 3"),
            format!("vllm:num_requests_waiting{labels}}} 2"),
            format!("vllm:num_requests_waiting_by_reason{labels},reason=\"capacity\"}} 2"),
            format!("vllm:num_requests_waiting_by_reason{labels},reason=\"deferred\"}} 0"),
            format!("vllm:kv_cache_usage_perc{labels}}} 0.25"),
            format!("vllm:iteration_tokens_total_count{labels}}} 1"),
            format!("vllm:iteration_tokens_total_bucket{labels},le=\"16.0\"}} 1"),
            format!("vllm:request_success_total{labels},finished_reason=\"length\"}} 1"),
            format!("vllm:cache_config_info{labels},block_size=\"16\"}} 1"),
            "vllm:admission_rejections_total{model_name=\"m\",reason=\"queue_full\"} 1".to_owned(),
        ] {
            assert!(text.contains(&line), "{line} is not in\n{text}");
        }
        assert_eq!(token_buckets(60), [1.0, 2.0, 5.0, 10.0, 20.0, 50.0]);
    }
}
