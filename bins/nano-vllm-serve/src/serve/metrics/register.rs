//! Under which names, with which labels and buckets the metrics are known.

use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use super::buckets::{
    FIRST_TOKEN, INTER_TOKEN, ITERATION, LATENCY, PARAMS_N, PREEMPTIONS, token_buckets,
};
use super::http::HttpMetrics;
use super::process::Process;
use super::tenants::tenant_metrics;
use super::{Label, Metrics, nothing};
use crate::serve::auth::Tenant;

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

impl Metrics {
    /// Metrics of one model. `config` are the labels of `vllm:cache_config_info`.
    pub fn new(
        model: &str,
        max_model_len: usize,
        config: Vec<(String, String)>,
        tenants: &[Tenant],
    ) -> Self {
        let mut registry = Registry::default();
        let http = Arc::new(HttpMetrics::new(&mut registry));
        registry.register_collector(Box::new(Process));
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
        // Nothing here waits for anything but room; vLLM's other reason is there for who asks for it.
        let by_reason = Family::<Label, Gauge>::default();
        sub.register(
            "vllm:num_requests_waiting_by_reason",
            "Sequences that wait, by what for",
            by_reason.clone(),
        );
        drop(by_reason.get_or_create(&[("reason", "deferred")]));
        let tokens = token_buckets(max_model_len);
        let mut b = Builder(sub);
        let kv_usage = Gauge::<f64, AtomicU64>::default();
        let this = Self {
            running: b.gauge("vllm:num_requests_running", "Sequences that run"),
            waiting: b.gauge("vllm:num_requests_waiting", "Sequences that wait"),
            waiting_for_capacity: by_reason.get_or_create(&[("reason", "capacity")]).clone(),
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
            request_timeouts: b.counter(
                "nano_vllm:request_timeouts",
                "Requests given up after --request-timeout",
            ),
            http,
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
}
