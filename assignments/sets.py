"""The seven problem sets: which functions are blanked, and what each of the project's tests pays.

A function that is in two sets is written in the first of them and extended in the second.
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
            "test_golden.py::test_a_node_sees_itself_and_its_ancestors": 2,
            "test_tree.py::test_depths_equal_brute_force": 4,
            "test_tree.py::test_paths_equal_brute_force": 4,
            "test_tree.py::test_mask_equals_brute_force": 5,
            "test_tree.py::test_the_mask_hides_the_sibling_branch": 3,
            "test_tree.py::test_a_tree_is_frozen_and_the_root_alone_is_one": 2,
        },
    ),
    2: ProblemSet(
        "Trees from paths, and the Cartesian tree",
        ("tree.tree_from_paths", "tree.cartesian_tree"),
        {
            "test_golden.py::test_a_cartesian_tree_has_every_combination": 2,
            "test_tree.py::test_worked_example_of_the_cartesian_tree": 3,
            "test_tree.py::test_cartesian_tree_holds_every_combination_once": 4,
            "test_tree.py::test_cartesian_tree_refuses_widths_below_one": 2,
            "test_tree.py::test_tree_from_paths_takes_any_order_and_round_trips": 5,
            "test_tree.py::test_tree_from_paths_names_the_path_it_refuses": 4,
        },
    ),
    3: ProblemSet(
        "Heads, and which token each is asked for",
        (
            "medusa.MedusaHeads.__init__",
            "medusa.MedusaHeads.forward",
            "medusa.targets_ahead",
            "medusa.cross_entropy",
            "medusa.medusa_loss",
        ),
        {
            "test_golden.py::test_a_new_head_is_the_lm_head_and_a_trained_one_adds_silu": 1,
            "test_golden.py::test_head_k_is_asked_for_the_token_k_plus_1_ahead": 1,
            "test_golden.py::test_the_loss_of_head_k_weighs_a_power_of_four_fifths": 1,
            "test_medusa.py::test_new_heads_are_exactly_the_lm_head": 3,
            "test_medusa.py::test_heads_equal_the_formula_evaluated_head_by_head_from_the_file": 3,
            "test_medusa.py::test_no_parameter_is_shared_among_layers_or_heads": 3,
            "test_medusa.py::test_targets_ahead_equal_brute_force": 4,
            "test_medusa.py::test_medusa_loss_equals_the_sum_taken_one_target_at_a_time": 3,
            "test_medusa.py::test_head_k_learns_the_token_k_plus_1_ahead_and_nothing_else": 1,
        },
    ),
    4: ProblemSet(
        "Typical acceptance",
        ("medusa.typical_threshold", "medusa.sample", "medusa.accept"),
        {
            "test_golden.py::test_the_typical_threshold_falls_with_the_entropy": 1,
            "test_golden.py::test_typical_acceptance_takes_guesses_that_are_plausible": 1,
            "test_golden.py::test_of_equally_deep_paths_the_most_likely_wins": 2,
            "test_medusa.py::test_typical_threshold_equals_the_formula": 4,
            "test_medusa.py::test_extreme_noise_samples_no_token_of_probability_zero": 2,
            "test_medusa.py::test_typical_acceptance_agrees_with_the_formula": 10,
        },
    ),
    5: ProblemSet(
        "Greedy and lossless acceptance",
        ("medusa.accept", "medusa.gumbel_scores"),
        {
            "test_golden.py::test_greedy_acceptance_follows_the_base_models_argmax": 2,
            "test_golden.py::test_lossless_acceptance_samples_with_the_noise": 2,
            "test_medusa.py::test_greedy_and_lossless_acceptance_follow_the_samples"
            "_of_the_nodes": 9,
            "test_medusa.py::test_a_lossless_guess_is_ranked_by_probability_over_noise": 5,
            "test_medusa.py::test_typical_and_greedy_acceptance_rank_guesses"
            "_by_likelihood_alone": 2,
        },
    ),
    6: ProblemSet(
        "The tree that calibration calls best",
        (
            "tree.prefix_counts",
            "tree.ranked_prefixes",
            "tree.calibrated_tree",
            "tree.expected_tokens",
        ),
        {
            "test_golden.py::test_a_calibrated_tree_has_the_most_frequent_prefixes": 1,
            "test_tree.py::test_prefix_counts_equal_brute_force": 3,
            "test_tree.py::test_expected_tokens_is_the_mean_of_what_each_position"
            "_would_have_emitted": 2,
            "test_tree.py::test_calibrated_tree_is_the_best_of_all_trees_of_its_size": 4,
            "test_tree.py::test_calibrated_tree_takes_the_most_frequent_prefixes": 3,
            "test_tree.py::test_calibrated_tree_breaks_ties_to_the_shorter"
            "_then_to_the_lower_ranks": 2,
            "test_tree.py::test_calibrated_tree_assumes_no_independence": 3,
            "test_tree.py::test_calibrated_tree_takes_counts_as_well_as_rows": 1,
            "test_tree.py::test_calibrated_tree_refuses_a_tree_without_guesses": 1,
        },
    ),
    7: ProblemSet(
        "Verify and commit: the decoding loop and its KV cache",
        ("model.KVCache.keep", "medusa.medusa_generate"),
        {
            "test_golden.py::test_keep_moves_the_accepted_rows_to_the_end_of_the_text": 1,
            "test_golden.py::test_a_whole_step_emits_the_tokens_of_plain_decoding": 1,
            "test_model.py::test_keep_moves_the_chosen_rows_down_and_forgets_the_others": 2,
            "test_medusa.py::test_a_tree_forward_and_keep_equal_feeding_tokens_one_by_one": 2,
            "test_medusa.py::test_greedy_tree_decoding_equals_plain_decoding": 3,
            "test_medusa.py::test_lossless_tree_sampling_gives_the_text_of_plain_sampling": 3,
            "test_medusa.py::test_head_k_fills_depth_k_from_the_state_before_the_root": 2,
            "test_medusa.py::test_right_guesses_are_all_accepted": 2,
            "test_medusa.py::test_eos_ends_the_text_in_the_middle_of_an_accepted_path": 1,
            "test_medusa.py::test_the_text_runs_up_to_the_context_limit_and_no_further": 2,
            "test_medusa.py::test_impossible_calls_are_refused[medusa_generate]": 1,
        },
    ),
}


def sets_of(function: str) -> list[int]:
    """The sets in which this function is written."""
    return [number for number, problem_set in SETS.items() if function in problem_set.functions]


# Blank in what is handed out, though no set asks for it: it would give away `forward`.
HIDDEN = ("medusa.MedusaHeads.one_head",)
BLANKED = sorted({function for problem_set in SETS.values() for function in problem_set.functions})
