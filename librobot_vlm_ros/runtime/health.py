"""The engine's state as one frozen picture for diagnostics."""

from __future__ import annotations

import math

from librobot_vlm_ros.runtime.config import to_s
from librobot_vlm_ros.runtime.engine_state import Shared
from librobot_vlm_ros.runtime.scheduler import drops
from librobot_vlm_ros.runtime.stats import CameraStats, EngineStats, percentile


def take_stats(shared: Shared) -> EngineStats:
    """A picture of now; waits for the lock, never for the model."""
    with shared.lock:
        return _stats(shared)


def _stats(shared: Shared) -> EngineStats:
    now_ns = shared.clock()
    meter, scheduler, model = shared.meter, shared.scheduler, shared.loaded
    ages = meter.ages(now_ns)
    all_ages = [age for of_camera in ages.values() for age in of_camera]
    times = meter.times(now_ns)
    started_ns = meter.run_started_ns
    mailboxes = scheduler.mailboxes
    return EngineStats(
        state=shared.state(),
        model=model.model if model is not None else "",
        revision=model.revision if model is not None else "",
        device=model.device if model is not None else "",
        dtype=model.dtype if model is not None else "",
        frames_received=sum(box.received for box in mailboxes.values()) + scheduler.unknown_frames,
        frames_processed=sum(box.processed for box in mailboxes.values()),
        dropped=drops(mailboxes, scheduler.unknown_frames),
        results=meter.results,
        errors=dict(meter.errors),
        age_p50_s=percentile(all_ages, 50),
        age_p99_s=percentile(all_ages, 99),
        inference_p50_s=percentile(times, 50),
        inference_p99_s=percentile(times, 99),
        inference_mean_s=sum(times) / len(times) if times else math.nan,
        tokens_per_s=meter.tokens_per_s(now_ns),
        queue_depth=len(shared.queue),
        in_flight=meter.in_flight,
        busy_s=max(0.0, to_s(now_ns - started_ns)) if started_ns is not None else 0.0,
        memory_bytes=meter.memory_bytes,
        free_bytes=meter.free_bytes,
        features_shared=meter.frame_counts.get("hits", 0),
        features_computed=meter.frame_counts.get("misses", 0),
        prepared_ahead=meter.frame_counts.get("ahead", 0),
        consecutive_failures=meter.consecutive_failures,
        last_error=str(meter.last_error) if meter.last_error is not None else "",
        last_error_age_s=(
            max(0.0, to_s(now_ns - meter.last_error_ns))
            if meter.last_error is not None
            else math.nan
        ),
        idle_tasks=scheduler.idle,
        cameras={
            name: CameraStats(
                received=box.received,
                processed=box.processed,
                dropped={reason.value: count for reason, count in box.dropped.items()},
                stale=shared.watchdog.is_stale(name),
                silent_s=shared.watchdog.silent_s(name, now_ns),
                rate_hz=meter.rate_hz(name, now_ns),
                age_p50_s=percentile(ages.get(name, ()), 50),
                age_p99_s=percentile(ages.get(name, ()), 99),
            )
            for name, box in mailboxes.items()
        },
    )
