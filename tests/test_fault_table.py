"""The faults that a run has to bear, row by row, and the tests that show how; rows that no test
shows say why.
"""

import ast
from functools import cache

import pytest

from tests.helpers import ROOT

E, D, C = "tests/engine/test_", "tests/data/test_", "tests/checkpoint/test_"
FAULTS = {
    1: (
        "kill -9 of a process in an epoch",
        E + "resume.py::two_processes_of_which_one_is_killed_resume_bit_identical",
        E + "resume.py::torchrun_restarts_a_killed_process_and_the_run_ends_bit_identical",
        E + "lost_processes.py::a_process_that_is_stopped_or_killed_ends_the_other_in_time",
    ),
    2: (
        "kill -9 of everything at random times",
        E + "resume.py::a_run_killed_at_random_times_ends_bit_identical",
        E + "resume.py::a_run_killed_anywhere_and_resumed_ends_bit_identical",
        E + "repair.py::a_run_killed_at_any_write_and_started_again_leaves_the_same_files",
        E + "training.py::a_run_saved_after_any_update_and_restored_is_bit_identical",
    ),
    3: (
        "SIGTERM, SIGUSR1, SIGHUP, Ctrl-C",
        E + "resume.py::sigterm_saves_after_the_update_and_the_same_command_goes_on_bit_identical",
        E + "distributed.py::a_signal_to_one_process_stops_both_after_the_same_update",
        E + "fit.py::a_signal_in_a_validation_ends_it_and_the_epoch_is_saved",
        E + "fit.py::a_signal_ends_the_wait_for_a_batch_that_does_not_come",
        E + "signals.py::a_signal_at_the_start_ends_a_run_with_its_status_and_leaves_nothing",
        "tests/test_slurm.py::the_script_requeues_what_a_signal_has_stopped",
    ),
    4: (
        "SIGTERM, twice, during a save",
        E + "resume.py"
        "::sigterm_in_an_evaluation_or_a_save_keeps_the_epoch_and_the_run_ends_bit_identical",
        E + "fit.py::a_signal_in_the_last_save_of_a_run_changes_nothing",
    ),
    5: (
        "disk full while saving",
        E + "state.py::a_full_disk_leaves_the_old_checkpoint_and_names_the_path",
        E + "repair.py::a_disk_that_fills_up_at_any_write_loses_no_epoch",
        E + "console.py::lines_that_a_full_disk_refuses_follow_once_there_is_space",
    ),
    6: (
        "truncated or empty checkpoint",
        E + "state.py::every_truncation_is_noticed_in_one_line",
        E + "state.py::auto_resume_falls_back_to_the_previous_whole_one_and_says_so",
    ),
    7: ("flipped bit", E + "state.py::a_flipped_bit_is_noticed_or_without_effect"),
    8: (
        "newest by date is not furthest",
        E + "state.py::the_furthest_checkpoint_is_chosen_by_content_not_by_date",
    ),
    9: ("malicious pickle", E + "state.py::code_in_a_checkpoint_is_refused_and_not_run"),
    10: (
        "checkpoint of Swin with a pickled config",
        E + "resume_files.py::a_run_of_swin_goes_on_at_its_epoch_with_its_optimizer",
    ),
    11: (
        "missing or unexpected keys",
        C + "load.py::a_missing_or_misspelt_key_is_refused_by_name",
        C + "load.py::partial_loading_is_possible_when_asked_for_and_is_a_warning",
    ),
    12: (
        "head of other classes",
        C + "load.py::a_head_of_another_class_count_starts_at_zero_and_says_so",
        C + "load.py::evaluation_refuses_a_head_that_is_not_the_file_s",
    ),
    13: (
        "loss not finite on one process",
        E + "distributed.py::a_nan_on_one_process_skips_the_update_on_both",
        E + "distributed.py::divergence_is_reported_with_the_process_it_came_from",
        E + "training.py::too_many_bad_updates_in_a_row_end_the_run_with_their_numbers",
        E + "finite.py::weights_that_are_not_finite_get_no_score",
    ),
    14: (
        "overflow in float16",
        E + "training.py::float16_scales_the_loss_and_halves_the_scale_after_an_overflow",
        E + "finite.py::outputs_that_are_not_finite_are_counted",
    ),
    15: (
        "corrupt training image",
        E + "faults.py::corrupt_training_images_are_replaced_up_to_the_limit",
        D + "loader.py::corrupt_training_image_is_replaced_the_same_way_everywhere_and_named_once",
    ),
    16: (
        "corrupt validation image",
        E + "faults.py::a_corrupt_validation_image_is_an_error_that_names_it",
        D + "loader.py::corrupt_validation_image_is_an_error_that_names_the_file",
        E + "fit.py::a_validation_that_fails_loses_no_epoch",
    ),
    17: (
        "loading process killed",
        D + "loader.py::worker_killed_while_it_loads",
        E + "fit.py::worker_killed_the_updates_before_it_are_saved",
    ),
    18: ("storage hangs", D + "loader.py::worker_hangs_and_the_file_it_was_reading_is_named"),
    19: (
        "a process hangs",
        E + "distributed.py::a_rank_that_hangs_ends_the_wait_with_the_stacks_of_all",
        E + "lost_processes.py::a_process_that_is_stopped_or_killed_ends_the_other_in_time",
    ),
    20: (
        "a process leaves out an exchange",
        E + "distributed.py::a_process_that_leaves_out_an_exchange_is_found_out",
    ),
    21: (
        "images that processes and batches do not divide",
        E + "evaluate.py::processes_agree_on_the_result_of_one_process",
        E + "evaluate.py::batch_size_does_not_change_the_result",
        E + "evaluate.py::more_processes_than_images_do_not_hang",
    ),
    22: (
        "the link of two machines goes down",
        E + "lost_processes.py::two_machines_whose_link_goes_down_both_end_in_time",
    ),
    24: ("port in use", "tests/test_launch.py::a_port_in_use_is_one_line_that_says_what_to_do"),
    25: (
        "memory exhausted",
        "tests/test_launch.py::full_memory_names_the_batch_size",
        E + "faults.py::memory_exhausted_is_one_line_with_what_to_lower",
    ),
    26: (
        "output folder that cannot be written, or is gone",
        E + "faults.py::a_wrong_setting_is_one_line_and_touches_nothing",
        E + "signals.py"
        "::an_evaluation_and_a_timing_end_with_a_signal_and_need_no_folder_to_write_to",
    ),
    27: (
        "clock jump, log rotation, closed standard output",
        E + "console.py::closed_standard_streams_do_not_end_a_run_and_the_log_says_so_once",
        E + "console.py::the_interpreters_last_flush_cannot_fail",
        E + "console.py::a_log_that_is_rotated_goes_on",
        E + "lock.py::a_clock_that_jumps_does_not_end_a_lock_that_is_touched",
    ),
    28: (
        "another number of processes",
        E + "faults.py::other_numbers_of_processes_go_on_from_the_end_of_an_epoch_only",
    ),
    29: (
        "another number of loading processes",
        D + "loader.py::batches_are_bit_identical_for_any_number_of_workers_and_over_epochs",
        D + "loader.py::an_epoch_entered_at_a_batch_continues_bit_by_bit",
    ),
    30: (
        "resuming with other settings",
        "tests/test_continuing.py::a_finished_run_is_not_the_result_of_other_settings",
        "tests/test_continuing.py"
        "::an_unfinished_run_goes_on_with_other_settings_only_where_asked_to",
        "tests/test_continuing.py::other_images_are_noticed",
    ),
    31: (
        "misspelt key, flag or option",
        "tests/test_config.py::an_unknown_key_is_refused_with_its_value_and_the_nearest_key",
        "tests/test_config.py::an_unknown_flag_ends_the_program_and_names_the_nearest",
    ),
    32: (
        "two runs in one folder",
        E + "faults.py::a_second_run_in_the_same_folder_is_refused_but_an_evaluation_is_not",
        E + "lock.py::of_six_processes_one_takes_an_expired_lock_over",
        E + "lock.py::a_lock_out_of_sight_holds_until_it_expires",
    ),
}
OPEN = {
    23: "machines that join and leave: torchrun starts all processes anew, which is row 1; with"
    " another number of them, row 28. No test changes the number under way",
}


@cache
def names_in(file: str) -> set[str]:
    """The names of the tests in a file."""
    tree = ast.parse((ROOT / file).read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_every_row_has_a_place():
    assert sorted([*FAULTS, *OPEN]) == list(range(1, 33)) and not FAULTS.keys() & OPEN


@pytest.mark.parametrize("row", FAULTS)
def test_the_tests_that_show_a_fault_exist(row):
    _, *shown = FAULTS[row]
    assert shown
    for place in shown:
        file, name = place.split("::")
        assert f"test_{name}" in names_in(file), place
