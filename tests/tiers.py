"""Which tests the fast tier leaves to `make test-all`, and why; and which tests one worker runs together.

The fast tier has at most six minutes on two idle cores. A test that takes more than about ten seconds there has to show
something that no other one does. What is listed here is run by `make test-all`; a test may also be marked slow where it
stands, where that is a property of the test and not of the tier's budget.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping

import pytest

EVERY_TEST = pytest.StashKey[list[str]]()
"""Where a session keeps the ids of all tests that were collected, before any is left out."""
SLOW: Mapping[str, tuple[str, ...]] = {
    "starts or compiles a vLLM; the fast tier: eager server, traced engine, MoBE, a family on two ranks": (
        "tests/serve/test_demo.py::*",
        "tests/serve/test_lm_eval.py::*",
        "tests/serve/test_lifetime.py::test_a_missing_attention_tensor_stops_vllm_serve_with_its_name",
        "tests/plugin/test_families_served.py::test_served_as_the_dense_reconstruction*",
        "tests/plugin/test_offline_llm.py::test_every_variant_on_two_ranks*",
        "tests/plugin/test_methods_served.py::*moe-svd]",
        "tests/plugin/test_offline_llm.py::test_compiled_equals_stock_vllm_and_transformers",
        "tests/plugin/test_offline_llm.py::test_eager_scope_batch_equals_transformers",
        "tests/plugin/test_register.py::test_vllm_serve_ends_with_our_sentence*",
        "tests/plugin/test_storage.py::test_a_worker_keeps_what_is_stored[[]mobe]",
        "tests/docs/test_blocks.py::test_commands[[]docs/serving.md:*]",
    ),
    "compiles with sanitizers, for other machines, or a wheel": (
        "tests/ops/test_cpu.py::test_the_core_is_clean_under_sanitizers*",
        "tests/ops/test_triton_aot.py::test_every_kernel_compiles_for_hopper",
        "tests/ops/test_triton_aot.py::test_the_harness_finds_spills_and_too_much_memory",
        "tests/ops/test_ahead.py::test_a_wheel_with_a_library_serves_without_a_compiler",
    ),
    "crowds in Triton's interpreter; the fast tier has one of each kernel against the oracle": (
        "tests/ops/test_triton.py::test_rounding_is_no_worse_than_the_reference*",
        "tests/ops/test_triton.py::test_batch_invariant_rows_are_the_same_bits_alone_and_in_a_crowd*",
        "tests/ops/test_triton.py::test_no_shape_depends_on_data_and_nothing_is_waited_for*",
        "tests/ops/test_triton.py::test_padding_rows_influence_nobody*",
        "tests/ops/test_triton.py::test_the_same_bits_on_every_call*",
        "tests/ops/test_triton_few.py::test_batch_invariant_rows_are_the_same_bits_alone_and_in_a_crowd[[]*token]",
        "tests/ops/test_triton_few.py::test_columns_of_a_packed_base_are_chosen_as_elsewhere*",
        "tests/ops/test_triton_few.py::test_no_shape_depends_on_data_and_nothing_is_waited_for[[]*columns]",
        "tests/ops/test_triton_few.py::test_no_shape_depends_on_data_and_nothing_is_waited_for[[]*factors*",
        "tests/ops/test_triton_few.py::test_rounding_is_no_worse_than_the_reference[[]*factors*",
        "tests/ops/test_triton_few.py::test_rounding_is_no_worse_than_the_reference[[]*biases]",
        "tests/ops/test_triton_few.py::test_rounding_is_no_worse_than_the_reference[[]*16 bits*",
        "tests/ops/test_triton_few.py::test_rounding_is_no_worse_than_the_reference[[]*V]",
        "tests/ops/test_triton_few.py::test_rounding_is_no_worse_than_the_reference[[]*columns]",
        "tests/ops/test_triton_few.py::test_rounding_is_no_worse_than_the_reference[[]*not packed]",
        "tests/ops/test_triton_few.py::test_rounding_is_no_worse_than_the_reference[[]*began]",
        "tests/ops/test_triton_few.py::test_rounding_is_no_worse_than_the_reference[[]*no gate, on a low-rank base]",
        "tests/ops/test_triton_few.py::test_where_rows_are_many_*[[]*began]",
        "tests/ops/test_triton_few.py::test_where_rows_are_many_*[[]*no gate, unequal widths]",
        "tests/ops/test_triton_few.py::test_packed_bases_that_vs_are_mixed_from[[]*8 bits]",
        "tests/ops/test_triton_few.py::test_packed_bases_that_vs_are_mixed_from[[]*2 bits]",
        "tests/ops/test_triton_launches.py::test_every_kernel_that_is_launched_is_compiled[[]dtype0]",
        "tests/ops/test_triton_tune.py::test_a_real_layer_is_tuned",
        "tests/ops/test_triton_mixed.py::test_such_layers_are_checked_when_a_model_is_loaded*",
        "tests/ops/test_triton.py::test_selection_is_the_references[[]*70-5-2-token]",
    ),
    "reads texts of 100 MB; the fast tier counts what is tokenized of one of some megabytes": (
        "tests/offline/test_texts.py::test_memory_does_not_depend_on_the_length_of_a_text*",
    ),
    "kills, interrupts and fills disks once more; the fast tier has one of each kind": (
        "tests/offline/test_compress.py::test_a_killed_run_ends_in_the_same_bytes*",
        "tests/offline/test_compress.py::test_a_disk_that_fills_up_meanwhile*",
        "tests/offline/test_compress.py::test_a_run_begun_with_other_threads_is_not_thrown_away",
        "tests/offline/test_compare.py::test_an_interrupt_ends_it",
        "tests/offline/test_compare.py::test_a_killed_run_goes_on_and_says_so",
        "tests/offline/test_hostile_disks.py::test_a_damaged_working_folder_is_recognised[[]*cut]",
        "tests/offline/test_hostile_disks.py::test_a_damaged_working_folder_is_recognised[[]*lengthened]",
        "tests/offline/test_hostile_disks.py::test_a_damaged_working_folder_is_recognised[[]layers/[*]/0000[*].safetensors-*",
        "tests/offline/test_hostile_disks.py::test_a_damaged_working_folder_is_recognised[[]hidden-00000.rows-*",
        "tests/offline/test_hostile_disks.py::test_a_disk_that_is_full_at_any_write_costs_nothing[[]1]",
        "tests/offline/test_hostile_disks.py::test_a_disk_that_is_full_at_any_write_costs_nothing[[]9]",
        "tests/offline/test_hostile_disks.py::test_a_disk_that_is_full_at_any_write_costs_nothing[[]24]",
        "tests/offline/test_hostile_neighbours.py::test_a_weight_that_changes_while_it_is_compressed_*[[]layers/[*]/facts*",
        "tests/offline/test_hostile_disks.py::test_a_run_that_is_broken_off_again_and_again*",
        "tests/offline/test_hostile_neighbours.py::test_two_runs_at_once_on_one_result",
        "tests/offline/test_compare.py::test_a_row_that_fails_leaves_the_others",
        "tests/offline/test_compare.py::test_without_workdir_the_same_command_goes_on_from_any_folder",
        "tests/offline/test_hostile_neighbours.py::test_a_weight_that_changes_between_two_runs_starts_over",
    ),
    "starts torchrun, whose processes each import torch and transformers": (
        "tests/offline/test_distributed.py::test_bad_input_is_one_line_once",
        "tests/offline/test_distributed.py::test_two_processes_give_what_one_gives_each_with_its_share_of_memory",
    ),
    "a benchmark, the second lock's audit, simulated alerts, a bound of memory, three models loaded for a document": (
        "tests/docs/test_blocks.py::test_python[[]docs/footguns.md:7]",
        "tests/offline/test_bench.py::test_the_bench_compares_both_sides*",
        "tests/deploy/test_audit.py::test_every_pin_of_the_locks_is_asked_about[[]gpu]",
        "tests/deploy/test_monitoring.py::test_promtool_is_content[[]test rules alerts.test.yml]",
        "tests/ops/test_cpu_mixed.py::test_no_v_is_ever_whole",
    ),
    "the quality of a compression, whose figures docs/quality.md has": (
        "tests/offline/test_priced.py::test_never_worse_than_low_rank_at_no_more_bytes*",
        "tests/offline/test_compress.py::test_the_default_beats_mean_base_and_plain_svd*",
        "tests/offline/test_methods.py::test_fitted_us_beat_each_experts_own",
    ),
    "the whole matrix; the fast tier has every recipe and every family once, by rotation": (
        *(
            f"tests/offline/test_sweeps.py::test_disk_and_progress_are_what_was_planned[[]{name}]"
            for name in ("pruned", "no base", "mean", "shared", "follows, uniform", "moe-svd")
        ),
        *(
            f"tests/offline/test_exact.py::test_the_order_of_windows_*[[]{name}]"
            for name in ("ties", "shared", "follows")
        ),
        *(
            f"tests/offline/test_exact.py::test_what_is_in_memory_*[[]{name}]"
            for name in ("default", "ties", "adaptive")
        ),
        *(f"tests/offline/test_exact.py::*order_of_experts*[[]{name}]" for name in ("default", "adaptive", "follows")),
        "tests/offline/test_methods.py::test_every_command_knows_the_method[[]moe-svd]",
        "tests/offline/test_exact.py::test_adaptive_is_never_worse_than_uniform[[]semi-dynamic]",
        "tests/offline/test_exact.py::test_adaptive_is_never_worse_than_uniform[[]none]",
        "tests/offline/test_hostile_weights.py::test_odd_weights_give_a_finite_result[[]identical experts-default]",
        "tests/offline/test_report.py::test_every_variant_of_the_format_has_a_report[[]what2-*",
        "tests/offline/test_report_page.py::test_it_fits_and_is_accessible[[]1280-light]",
        # Their worse cases stay: all experts zero, large float16.
        "tests/offline/test_hostile_weights.py::test_odd_weights_give_a_finite_result[[]as it is-default]",
        "tests/offline/test_hostile_weights.py::test_odd_weights_give_a_finite_result[[]one expert zero-default]",
        "tests/offline/test_hostile_weights.py::test_odd_weights_give_a_finite_result[[]float16-default]",
        "tests/offline/test_matrix.py::test_an_fp8_original_is_compressed_as_what_it_stands_for",
    ),
}
"""Why -> patterns of node ids."""

TOGETHER: Mapping[str, str] = {
    "tests/serve/": "serve",
    **dict.fromkeys(
        (
            "tests/docs/",
            "tests/offline/test_families.py",
            "tests/offline/test_report.py",
            "tests/plugin/test_quantizer.py",
            "tests/plugin/test_transformers.py",
        ),
        "forked",
    ),
    **dict.fromkeys(
        (
            "tests/offline/test_compress.py",
            "tests/offline/test_hostile_disks.py",
            "tests/offline/test_hostile_neighbours.py",
            "tests/offline/test_kills.py",
        ),
        "killed",
    ),
    **dict.fromkeys(
        (
            "tests/plugin/test_families_served.py",
            "tests/plugin/test_few_bits_served.py",
            "tests/plugin/test_fit_served.py",
            "tests/plugin/test_methods_served.py",
            "tests/plugin/test_metrics.py",
            "tests/plugin/test_offline_llm.py",
            "tests/plugin/test_register.py",
            "tests/plugin/test_storage.py",
            "tests/plugin/test_unlisted_served.py",
        ),
        "engine",
    ),
}
"""Beginning of a node id -> the tests that share a server, or a process that has imported vLLM or transformers and is
forked, and so a worker; all others are with those of their file."""
FIRST = (
    "serve",
    "engine",
    "forked",
    "tests/offline/test_matrix.py",
    "killed",
    "tests/ops/test_triton.py",
    "tests/offline/test_exact.py",
    "tests/offline/test_compare.py",
    "tests/offline/test_report_page.py",
)
"""What takes longest, so that it is not what one worker is left with at the end."""


def is_slow(node: str) -> bool:
    return any(fnmatch.fnmatchcase(node, pattern) for patterns in SLOW.values() for pattern in patterns)


def group(node: str) -> str:
    """Tests of one group run in one worker, one after another."""
    return next((name for start, name in TOGETHER.items() if node.startswith(start)), node.partition("::")[0])


def unmatched(nodes: list[str]) -> list[str]:
    """Patterns that no test has any more."""
    every = [pattern for patterns in SLOW.values() for pattern in patterns]
    return [pattern for pattern in every if not fnmatch.filter(nodes, pattern)]
