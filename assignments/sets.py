"""The seven problem sets: which functions are blanked, which files are handed in, which of the project's tests pay how many points.

A function that stands in two sets is written in the first of them and widened in the second.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class ProblemSet:
    title: str
    functions: tuple[str, ...]  # module.name or module.Class.name
    tests: dict[str, int]  # of tests/: file::test, or file::test[case], and its points

    @property
    def files(self) -> list[str]:
        return sorted({name.partition(".")[0] + ".py" for name in self.functions})


SETS = {
    1: ProblemSet(
        "What a node of the tree sees",
        ("tree.Tree.depths", "tree.Tree.paths", "tree.Tree.mask"),
        {
            "test_tree.py::test_depths_equal_brute_force": 4,
            "test_tree.py::test_paths_equal_brute_force": 4,
            "test_tree.py::test_mask_equals_brute_force": 6,
            "test_tree.py::test_the_mask_hides_the_sibling_branch": 4,
            "test_tree.py::test_a_tree_is_frozen_and_the_root_alone_is_one": 2,
        },
    ),
    2: ProblemSet(
        "Trees from paths, and the Cartesian tree",
        ("tree.tree_from_paths", "tree.cartesian_tree"),
        {
            "test_tree.py::test_worked_example_of_the_cartesian_tree": 4,
            "test_tree.py::test_cartesian_tree_holds_every_combination_once": 4,
            "test_tree.py::test_cartesian_tree_refuses_widths_below_one": 2,
            "test_tree.py::test_tree_from_paths_takes_any_order_and_round_trips": 5,
            "test_tree.py::test_tree_from_paths_names_the_path_it_refuses": 5,
        },
    ),
    3: ProblemSet(
        "Heads, and which token each is asked for",
        (
            "medusa.MedusaHeads.__init__",
            "medusa.MedusaHeads.forward",
            "medusa.cross_entropy_ahead",
            "medusa.medusa_loss",
        ),
        {
            "test_medusa.py::test_new_heads_are_exactly_the_lm_head": 3,
            "test_medusa.py::test_heads_equal_the_formula_evaluated_head_by_head_from_the_file": 3,
            "test_medusa.py::test_no_parameter_is_shared_among_layers_or_heads": 2,
            "test_medusa.py::test_training_heads_never_moves_the_lm_head": 2,
            "test_medusa.py::test_private_heads_start_as_copies_of_their_own": 1,
            "test_medusa.py::test_medusa_loss_equals_the_sum_taken_one_target_at_a_time": 3,
            "test_medusa.py::test_medusa_loss_decays_by_four_fifths_unless_told": 1,
            "test_medusa.py::test_masked_targets_have_no_influence": 2,
            "test_medusa.py::test_heads_without_targets_add_nothing": 1,
            "test_medusa.py::test_head_k_learns_the_token_k_plus_1_ahead_and_nothing_else": 2,
        },
    ),
    4: ProblemSet(
        "Typical acceptance",
        ("medusa.typical_threshold", "medusa.draw", "medusa.accept"),
        {
            "test_medusa.py::test_typical_threshold_equals_the_formula": 4,
            "test_medusa.py::test_typical_defaults_are_those_of_the_paper": 2,
            "test_medusa.py::test_a_token_is_drawn_with_its_probability": 2,
            "test_medusa.py::test_the_edges_of_the_noise_draw_tokens_of_nonzero_probability": 1,
            "test_medusa.py::test_typical_acceptance_agrees_with_the_formula": 4,
            "test_medusa.py::test_typical_acceptance_takes_everything_of_nonzero_probability_as_epsilon_goes_to_zero": 1,
            "test_medusa.py::test_a_point_mass_accepts_only_its_token": 2,
            "test_medusa.py::test_of_equally_deep_paths_the_likeliest_wins": 2,
            "test_medusa.py::test_the_next_root_of_typical_acceptance_is_drawn": 2,
        },
    ),
    5: ProblemSet(
        "Greedy and lossless acceptance",
        ("medusa.accept", "medusa.gumbel_scores"),
        {
            "test_medusa.py::test_greedy_and_lossless_acceptance_follow_the_draws_of_the_nodes": 6,
            "test_medusa.py::test_token_zero_is_never_accepted_without_being_guessed": 2,
            "test_medusa.py::test_lossless_tree_sampling_draws_the_text_that_plain_sampling_draws_from_the_same_seed": 4,
            "test_medusa.py::test_texts_sampled_through_a_tree_pass_a_chi_square_test_and_a_redraw_for_each_child_does_not[False]": 3,
            "test_medusa.py::test_heads_that_think_as_the_base_does_guess_every_draw": 3,
            "test_medusa.py::test_typical_and_greedy_acceptance_rank_guesses_by_likelihood_alone": 2,
        },
    ),
    6: ProblemSet(
        "Verify and commit: the decoding loop and its KV cache",
        ("model.KVCache.keep", "medusa.medusa_generate"),
        {
            "test_model.py::test_keep_moves_the_chosen_rows_down_and_forgets_the_others": 3,
            "test_medusa.py::test_a_tree_forward_equals_plain_forwards_and_keep_equals_feeding_one_by_one": 3,
            "test_medusa.py::test_greedy_tree_decoding_equals_plain_decoding": 4,
            "test_medusa.py::test_head_k_fills_depth_k_from_the_state_before_the_root": 1,
            "test_medusa.py::test_right_guesses_are_all_accepted": 2,
            "test_medusa.py::test_eos_ends_the_text_in_the_middle_of_an_accepted_path": 2,
            "test_medusa.py::test_the_tree_shrinks_to_the_room_before_the_context_limit": 2,
            "test_medusa.py::test_nothing_is_read_or_written_beyond_the_context": 1,
            "test_medusa.py::test_heads_run_at_one_node_alone_and_the_base_once_a_step": 1,
            "test_medusa.py::test_calls_that_cannot_be_honoured_are_refused[<lambda>]": 1,
        },
    ),
    7: ProblemSet(
        "The tree that calibration calls best",
        (
            "tree.prefix_counts",
            "tree.ranked_prefixes",
            "tree.calibrated_tree",
            "tree.expected_tokens",
        ),
        {
            "test_tree.py::test_prefix_counts_equal_brute_force": 3,
            "test_tree.py::test_expected_tokens_is_the_mean_of_what_each_position_would_have_emitted": 2,
            "test_tree.py::test_calibrated_tree_is_the_best_of_all_trees_of_its_size": 4,
            "test_tree.py::test_calibrated_tree_takes_the_most_frequent_prefixes_and_breaks_ties_to_the_shorter_then_lower": 4,
            "test_tree.py::test_calibrated_tree_breaks_ties_to_the_shorter_then_to_the_lower_ranks": 2,
            "test_tree.py::test_calibrated_tree_assumes_no_independence": 3,
            "test_tree.py::test_calibrated_tree_takes_counts_as_well_as_rows": 1,
            "test_tree.py::test_calibrated_tree_refuses_a_tree_without_guesses": 1,
        },
    ),
}


def sets_of(function: str) -> list[int]:
    """The sets in which this function is written."""
    return [number for number, problem_set in SETS.items() if function in problem_set.functions]


BLANKED = sorted({function for problem_set in SETS.values() for function in problem_set.functions})
