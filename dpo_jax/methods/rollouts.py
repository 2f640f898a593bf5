"""The fields that all methods share which learn from images that the model draws itself, in rounds."""

from dpo_jax.fields import COUNT, NOT_ALL, NOT_NEGATIVE, SHARE, Field

SAMPLERS = ("ddim", "euler", "euler_ancestral", "dpmsolver++", "lcm", "flow_euler", "flow_sde", "flow_cps")

ROLLOUT_FIELDS = {
    "online.rounds": Field(400, "Rounds of sampling, judging and training.", **COUNT),
    "online.prompts": Field(
        "ddpo_animals", "Prompts to train on: a bundled list, or a file as sample --prompts takes."
    ),
    "online.prompts_per_round": Field(20, "Prompts per round.", at_least=1, at_most=2**20),
    "online.candidates": Field(2, "Images per prompt, from the same starting noise.", at_least=1, at_most=2**10),
    "online.judges": Field(("jpeg_compressibility",), "Judges, as evaluate --judges takes them; () asks people."),
    "online.watched_judges": Field(
        (), "Judges that score every round and are never trained on: they tell when a trained judge is exploited."
    ),
    "online.watched_fall": Field(
        0.05,
        "Warn when a watched judge falls by this share of its value in the first round while a judge rises; 0 never.",
        **NOT_ALL,
    ),
    "online.watched_stop": Field(
        0.075,
        "End the run when it falls by this share; 0 never ends it.",
        **NOT_ALL,
    ),
    "online.diversity_fall": Field(
        0.5, "Warn when the diversity of a prompt's images falls by this share while a judge rises; 0 never.", **NOT_ALL
    ),
    "online.diversity_stop": Field(
        0.0,
        "End the run when the diversity falls by this share; 0 never ends it.",
        **NOT_ALL,
    ),
    "online.combine": Field(
        "pareto",
        "How several judges combine: pareto (better for one, worse for none) or mean; advantages take the mean.",
        choices=("mean", "pareto"),
    ),
    "online.sampler": Field(
        "ddim",
        "Sampler; it must add noise: ddim or euler_ancestral, and flow_sde or flow_cps for flow models.",
        choices=SAMPLERS,
    ),
    "online.sampling_steps": Field(20, "Denoising steps per image.", **COUNT),
    "online.eta": Field(1.0, "Share of fresh noise in each step of ddim; above 0, so that steps are random.", **SHARE),
    "online.noise_level": Field(
        0.0,
        "Noise of flow_sde and flow_cps; 0 takes the published 0.7 and 0.8. Above 1 for flow_sde only.",
        **NOT_NEGATIVE,
    ),
    "online.window": Field(
        0,
        "Flow-GRPO-Fast: only so many steps of the first half add noise and are trained on; 0 takes all.",
        **NOT_NEGATIVE,
    ),
    "online.guidance": Field(5.0, "Classifier-free guidance scale of sampling and training.", **NOT_NEGATIVE),
    "online.train_guided": Field(
        True, "Train with guidance; without it policy and reference need half of the evaluations."
    ),
    "online.prompts_at_a_time": Field(
        5, "Prompts sampled together, with all their candidates.", at_least=1, at_most=2**20
    ),
    "online.encode_prompts": Field(
        True, "Run the text encoders once per prompt, before the first round; then they leave the devices."
    ),
    "online.evaluate_every": Field(
        0, "Rounds between two evaluations, also after the last round; 0 turns them off.", **NOT_NEGATIVE
    ),
    "online.evaluation_prompts": Field("bundled", "Prompts to evaluate with; choose others than those trained on."),
    "online.branching": Field(False, "SPO: candidates part at every step and are judged there; a random one goes on."),
    "online.branch_after": Field(
        0.0, "Share of the steps before candidates part, which are not trained on.", **NOT_ALL
    ),
    "online.latent_judge": Field(
        "",
        "LPO: judge latents by the implicit reward of two UNets, TUNED:REFERENCE, or TUNED against the first policy.",
    ),
    "online.best_and_worst": Field(False, "SPO: compare only the best and the worst candidate."),
    "online.margin": Field(
        0.0, "SPO: compare them only if softmax([best, worst]) of the judge differs by more.", **NOT_ALL
    ),
    "online.timesteps": Field(1.0, "Share of the steps of a trajectory to train on.", above=0, at_most=1),
    "online.epochs": Field(1, "Passes over the images of a round.", **COUNT),
    "online.update_by": Field(
        "prompt",
        "One update for all pairs of a prompt, or one per pair, as D3PO does with people.",
        choices=("prompt", "pair"),
    ),
    "online.reference": Field(
        "initial",
        "Reference: the initial policy, or the one that sampled the round, which needs no extra evaluation.",
        choices=("initial", "round"),
    ),
    "online.clip": Field(0.1, "How far the ratio to the reference may be from 1 (D3PO, SPO, LPO).", above=0, below=1),
    "online.advantage": Field(
        "prompt",
        "Advantages from the prompt's last rewards, its candidates, or these over the round's deviation.",
        choices=("prompt", "group", "round"),
    ),
}
"""By dotted path, in the order in which --help lists them. The defaults are those of D3PO's released code."""
