//! Prometheus metrics under vLLM's names, types and labels.

use std::sync::Mutex;
use std::sync::atomic::AtomicU64;

use batch_scheduler::{StepStats, Totals};
use engine::{FinishReason, RequestOutput, Stats};
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use super::auth::{Tenant, TenantId};

type Label = [(&'static str, &'static str); 1];

const LATENCY: [f64; 21] = [
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
    480.0, 960.0, 1920.0, 7680.0,
];
const FIRST_TOKEN: [f64; 22] = [
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
];
/// vLLM's buckets begin at 10 ms; the four before them are for small models.
const INTER_TOKEN: [f64; 23] = [
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75,
    1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
];
const ITERATION: [f64; 13] = [
    1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0,
];
const PARAMS_N: [f64; 5] = [1.0, 2.0, 5.0, 10.0, 20.0];
const PREEMPTIONS: [f64; 7] = [1.0, 2.0, 3.0, 4.0, 5.0, 10.0, 20.0];

/// 1, 2, 5, 10, ... up to `most`.
fn token_buckets(most: usize) -> Vec<f64> {
    let powers = std::iter::successors(Some(1usize), |p| p.checked_mul(10));
    powers
        .flat_map(|p| [1, 2, 5].map(|m| m * p))
        .take_while(|bucket| *bucket <= most)
        .map(|bucket| bucket as f64)
        .collect()
}

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
    /// By tenant; empty if no key is needed.
    tenants: Vec<TenantMetrics>,
    success: Family<Label, Counter>,
    rejections: Family<Label, Counter>,
    /// The engine's totals at the last step: counters grow by the difference.
    seen: Mutex<Stats>,
}

/// What one tenant has had.
struct TenantMetrics {
    requests: Counter,
    rejections: Counter,
    prompt_tokens: Counter,
    generation_tokens: Counter,
    queue_time: Histogram,
}

type KeyLabel = [(&'static str, String); 1];

/// Series labelled with the tenants' names: vLLM has none by key, so the prefix is another.
fn tenant_metrics(registry: &mut Registry, tenants: &[Tenant]) -> Vec<TenantMetrics> {
    if tenants.is_empty() {
        return Vec::new();
    }
    let mut counter = |name: &str, help: &str| {
        let family = Family::<KeyLabel, Counter>::default();
        registry.register(name, help, family.clone());
        family
    };
    let requests = counter("nano_vllm:key_requests", "Prompts that were taken, by key");
    let rejections = counter(
        "nano_vllm:key_admission_rejections",
        "Requests that were not taken, by key",
    );
    let prompt_tokens = counter("nano_vllm:key_prompt_tokens", "Prompt tokens, by key");
    let generation_tokens = counter(
        "nano_vllm:key_generation_tokens",
        "Tokens generated, by key",
    );
    let new_histogram: fn() -> Histogram = || Histogram::new(FIRST_TOKEN);
    let queue_time =
        Family::<KeyLabel, Histogram, fn() -> Histogram>::new_with_constructor(new_histogram);
    registry.register(
        "nano_vllm:key_queue_time_seconds",
        "From arrival to the first step, by key",
        queue_time.clone(),
    );
    let one = |tenant: &Tenant| {
        let label = [("api_key", tenant.name.clone())];
        TenantMetrics {
            requests: requests.get_or_create_owned(&label),
            rejections: rejections.get_or_create_owned(&label),
            prompt_tokens: prompt_tokens.get_or_create_owned(&label),
            generation_tokens: generation_tokens.get_or_create_owned(&label),
            queue_time: queue_time.get_or_create_owned(&label),
        }
    };
    tenants.iter().map(one).collect()
}

struct Builder<'a>(&'a mut Registry);

impl Builder<'_> {
    fn counter(&mut self, name: &str, help: &str) -> Counter {
        let counter = Counter::default();
        self.0.register(name, help, counter.clone());
        counter
    }

    fn gauge(&mut self, name: &str, help: &str) -> Gauge {
        let gauge = Gauge::default();
        self.0.register(name, help, gauge.clone());
        gauge
    }

    fn histogram(&mut self, name: &str, help: &str, buckets: &[f64]) -> Histogram {
        let histogram = Histogram::new(buckets.iter().copied());
        self.0.register(name, help, histogram.clone());
        histogram
    }

    fn family(&mut self, name: &str, help: &str) -> Family<Label, Counter> {
        let family = Family::default();
        self.0.register(name, help, family.clone());
        family
    }
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
    /// Metrics of one model. `config` are the labels of `vllm:cache_config_info`.
    pub fn new(
        model: &str,
        max_model_len: usize,
        config: Vec<(String, String)>,
        tenants: &[Tenant],
    ) -> Self {
        let mut registry = Registry::default();
        let model_only = [("model_name".into(), model.to_owned().into())];
        let by_model = registry.sub_registry_with_labels(model_only.clone().into_iter());
        let tenants = tenant_metrics(by_model, tenants);
        let rejections = Builder(by_model).family(
            "vllm:admission_rejections",
            "Requests that were not taken, by reason",
        );
        let labels = model_only
            .into_iter()
            .chain([("engine".into(), "0".into())]);
        let sub = registry.sub_registry_with_labels(labels);
        let info = Family::<Vec<(String, String)>, Gauge>::default();
        info.get_or_create(&config).set(1);
        sub.register("vllm:cache_config_info", "The KV cache", info);
        let tokens = token_buckets(max_model_len);
        let mut b = Builder(sub);
        let kv_usage = Gauge::<f64, AtomicU64>::default();
        let this = Self {
            running: b.gauge("vllm:num_requests_running", "Sequences that run"),
            waiting: b.gauge("vllm:num_requests_waiting", "Sequences that wait"),
            kv_usage: kv_usage.clone(),
            preemptions: b.counter("vllm:num_preemptions", "Sequences preempted"),
            prefix_queries: b.counter(
                "vllm:prefix_cache_queries",
                "Tokens looked up in the prefix cache",
            ),
            prefix_hits: b.counter("vllm:prefix_cache_hits", "Tokens found in the prefix cache"),
            iteration_tokens: b.histogram(
                "vllm:iteration_tokens_total",
                "Tokens computed in a step",
                &ITERATION,
            ),
            prompt_tokens: b.counter("vllm:prompt_tokens", "Prompt tokens processed"),
            prompt_tokens_cached: b.counter(
                "vllm:prompt_tokens_cached",
                "Prompt tokens that the prefix cache had",
            ),
            generation_tokens: b.counter("vllm:generation_tokens", "Tokens generated"),
            first_token: b.histogram(
                "vllm:time_to_first_token_seconds",
                "From arrival to the first token",
                &FIRST_TOKEN,
            ),
            inter_token: b.histogram(
                "vllm:inter_token_latency_seconds",
                "Between two tokens of a sequence",
                &INTER_TOKEN,
            ),
            e2e: b.histogram(
                "vllm:e2e_request_latency_seconds",
                "From arrival to the end",
                &LATENCY,
            ),
            queue_time: b.histogram(
                "vllm:request_queue_time_seconds",
                "From arrival to the first step",
                &LATENCY,
            ),
            prefill_time: b.histogram(
                "vllm:request_prefill_time_seconds",
                "From the first step to the first token",
                &LATENCY,
            ),
            decode_time: b.histogram(
                "vllm:request_decode_time_seconds",
                "From the first token to the end",
                &LATENCY,
            ),
            inference_time: b.histogram(
                "vllm:request_inference_time_seconds",
                "From the first step to the end",
                &LATENCY,
            ),
            time_per_output_token: b.histogram(
                "vllm:request_time_per_output_token_seconds",
                "Decode time by tokens after the first",
                &INTER_TOKEN,
            ),
            request_prompt_tokens: b.histogram(
                "vllm:request_prompt_tokens",
                "Tokens of a prompt",
                &tokens,
            ),
            request_generation_tokens: b.histogram(
                "vllm:request_generation_tokens",
                "Tokens of an answer",
                &tokens,
            ),
            request_max_generation_tokens: b.histogram(
                "vllm:request_max_num_generation_tokens",
                "Tokens of a request's longest answer",
                &tokens,
            ),
            request_params_max_tokens: b.histogram(
                "vllm:request_params_max_tokens",
                "max_tokens of a request",
                &tokens,
            ),
            request_params_n: b.histogram("vllm:request_params_n", "n of a request", &PARAMS_N),
            request_preemptions: b.histogram(
                "vllm:request_num_preemptions",
                "Preemptions of a request",
                &PREEMPTIONS,
            ),
            request_prefill_computed: b.histogram(
                "vllm:request_prefill_kv_computed_tokens",
                "Prompt tokens that the prefix cache did not have",
                &tokens,
            ),
            success: b.family("vllm:request_success", "Requests that ended, by reason"),
            rejections,
            tenants,
            seen: Mutex::new(nothing()),
            registry: Registry::default(),
        };
        b.0.register(
            "vllm:kv_cache_usage_perc",
            "Share of the KV cache that sequences hold, 0 to 1",
            kv_usage,
        );
        for reason in ["stop", "length", "abort", "error"] {
            drop(this.success.get_or_create(&[("finished_reason", reason)]));
        }
        for reason in ["queue_full", "queue_timeout", "shutting_down"] {
            drop(this.rejections.get_or_create(&[("reason", reason)]));
        }
        Self { registry, ..this }
    }

    /// A step has ended.
    pub fn on_step(&self, stats: &Stats) {
        let gauge = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
        self.running.set(gauge(stats.running));
        self.waiting.set(gauge(stats.waiting));
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
    use super::*;

    #[test]
    fn counters_grow_by_what_the_engine_did() {
        let metrics = Metrics::new("m", 1000, vec![("block_size".into(), "16".into())], &[]);
        let mut stats = nothing();
        (stats.running, stats.kv_used_blocks, stats.kv_total_blocks) = (3, 1, 4);
        (stats.totals.steps, stats.totals.prefill_tokens) = (1, 9);
        metrics.on_step(&stats);
        metrics.on_step(&stats);
        metrics.on_end(FinishReason::Length);
        metrics.on_rejection(TenantId::default(), Rejection::QueueFull);
        let text = metrics.text();
        let labels = r#"{model_name="m",engine="0""#;
        for line in [
            format!("vllm:num_requests_running{labels}}} 3"),
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
