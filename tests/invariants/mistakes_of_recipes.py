"""Of recipes, sweeps, numbers and options that do not go together."""

from tests.invariants.mistakes import DEEP, Row, write

DIVERGING = "training.learning_rate=1e30"
GP_VAE = """\
model: {family: gp_vae, hidden_size: 16, num_attention_heads: 2, latent_size: 4, encoder_dilations: [1, 2]}
data: {source: texts.txt, unit: sentences, length: 8, vocab_size: 300}
training: {max_steps: 2, per_device_train_batch_size: 2, save_strategy: "no", eval_strategy: "no", report_to: none,
           use_cpu: true}
"""

RECIPES_TABLE = [
    # ---- recipes
    Row(
        "misspelt key: recipe", "train small.yaml training.max_step=3", r"unknown key training.max_step \(did you mean"
    ),
    Row(
        "misspelt key: section",
        "train small.yaml traning.max_steps=3",
        r"unknown key 'traning' \(did you mean training",
    ),
    Row(
        "misspelt key: model",
        "train small.yaml model.hiden_size=3",
        r"no field of the family \(did you mean hidden_size",
    ),
    Row("misspelt key: data", "train small.yaml data.lenght=3", r"unknown key data.lenght \(did you mean length\?\)"),
    Row("misspelt key: of a sweep", "sweep sweep.yaml model.betta=1", "did you mean beta"),
    Row(
        "recipe: override without value", "train small.yaml training.max_steps", "not of the form section.key=value, as"
    ),
    Row("recipe: no number", "train small.yaml training.max_steps=many", "must be a whole number, not 'many'"),
    Row("recipe: ours", "train small.yaml training.output_dir=x", "set by latentlm itself: leave it out"),
    Row("recipe: not supported", "train small.yaml training.push_to_hub=true", "not supported yet: leave it out"),
    Row("recipe: no YAML", "train a.yaml", "a.yaml, line 2: not valid YAML", write("a.yaml", "model:\n\t- x\n")),
    Row("recipe: nested", "train a.yaml", "a.yaml: not valid YAML: it is nested", write("a.yaml", "a: " + DEEP)),
    Row(
        "recipe: no date",
        "train a.yaml",
        "a.yaml, line 1: not valid YAML: '2026-99-99' is no .*, put it in quotes",
        write("a.yaml", "model: 2026-99-99"),
    ),
    Row("recipe: no date in an override", "train small.yaml model.inference_lr=2020-13-45", "not valid YAML"),
    Row("recipe: twice", "train a.yaml", "line 2: model is given twice", write("a.yaml", "model: {}\nmodel: {}\n")),
    Row("recipe: no mapping", "train texts.txt", "texts.txt"),
    Row("recipe: optimiser", "train small.yaml training.optim=best", "training.optim: .*best"),
    Row(
        "recipe: a folder called words",
        "train small.yaml data.tokenizer=./words",
        "./words holds no tokenizer that loads .*: give another",
        lambda folder: (folder / "words").mkdir(),
    ),
    Row("recipe: options of the optimiser", "train small.yaml training.optim_args=x", "must be of the form name=value"),
    # ---- against collapse
    *(
        Row(f"recipe: {name}", f"train small.yaml {settings}", says)
        for name, settings, says in (
            ("a cycle that is none", "model.beta_cycles=2 model.beta_cycle_ratios=[0.5,0.9,0.1]", "that sum to 1, not"),
            (
                "a cycle of two parts",
                "model.beta_cycles=2 model.beta_cycle_ratios=[0.5,0.5]",
                "three shares of a cycle",
            ),
            ("cycles without end", f"model.beta_cycles={10**20}", "beta_cycles must be at most"),
            ("a warm-up longer than training", "model.beta_warmup=2", "fraction of training between 0 and 1, not 2"),
            ("two schedules", "model.kl_target=3 model.beta_warmup=0.2", "two schedules of beta: give one"),
            ("a target of nothing", "model.kl_target=0", "kl_target must be a number above 0, or null"),
            ("a threshold that is no number", "model.kl_threshold=.nan", "kl_threshold must be a number above 0"),
            ("two charges", "model.kl_threshold=3 model.free_bits=0.1", "two charges for the KL: give one"),
            ("word dropout", "model.word_dropout=1.2", "word_dropout must be between 0 and 1"),
            ("latent dropout", "model.latent_dropout=1", r"latent_dropout must be in \[0, 1\)"),
            (
                "batch norm of no encoder",
                "model.encoder_batch_norm=0.5",
                "needs an encoder, and inference gradient has",
            ),
            (
                "cycles at 0 for ever",
                "model.beta_cycles=2 model.beta_cycle_ratios=[1,0,0]",
                "leave the weight at 0 for ever",
            ),
            ("a target without a KL", "model.kl_target=3 model.inference=langevin", "trains without one: leave it out"),
            ("no encoder to train", "encoder.pretraining_steps=1", "has no encoder to train: set model.inference to"),
            (
                "longer in school than in life",
                "model.inference=amortised encoder.pretraining_steps=3",
                "pretraining_steps must be less than training.max_steps, 3",
            ),
            (
                "an encoder from nowhere",
                "model.inference=amortised encoder.initial=nothing",
                "nothing does not exist or is no folder: give",
            ),
            (
                "an encoder of a control",
                "model.inference=amortised encoder.initial=control",
                "control holds a Autoregressive, and the encoder must be one of the family LTM",
            ),
            (
                "an encoder of a model without",
                "model.inference=amortised encoder.initial=model",
                r"the encoder of model is another \(for one, encoder.*: give it the same fields",
            ),
            (
                "an encoder of other words",
                "model.inference=amortised encoder.initial=model data.vocab_size=280",
                "the encoder of model does not know this vocabulary: give data.tokenizer=model",
            ),
        )
    ),
    # ---- trajectories
    *(
        Row(f"recipe: GP-VAE, {name}", f"train gp.yaml {settings}", says, write("gp.yaml", GP_VAE))
        for name, settings, says in (
            ("no such kernel", "model.kernel=linear", "expected one of .*white.*, got linear"),
            ("groups that do not fit", "model.kernel_groups=3", "must be a multiple of kernel_groups"),
            ("a lengthscale of nothing", "model.kernel_lengthscale=0", "kernel_lengthscale must be a number above 0"),
            ("three lengthscales", "model.kernel_lengthscale=[1,2,3]", "must be a number above 0, or two"),
            ("two lengthscales of one kernel", "model.kernel_lengthscale=[1,2]", "need kernel_groups to be spread"),
            ("no nugget", "model.kernel_nugget=0", "kernel_nugget must be a number above 0"),
            ("a white kernel in groups", "model.kernel=white model.kernel_groups=2", "leave kernel_groups at 1"),
            ("steps in z", "model.inference=gradient", "in whitened coordinates: set posterior to whitened"),
            (
                "a start for each number",
                "model.inference=gradient model.posterior=whitened model.inference_start=learned",
                "a trajectory is as long as its text",
            ),
            ("batch norm", "model.encoder_batch_norm=0.5", "a trajectory is as long as its text"),
            ("no convolution", "model.encoder_dilations=[]", "encoder_dilations must be numbers from 1 on"),
            ("no kernel", "model.encoder_kernel_size=0", "encoder_kernel_size must be at least 1"),
            ("smoothing all away", "model.label_smoothing=1", r"label_smoothing must be in \[0, 1\)"),
            ("horizons", "model.horizons=-1", "horizons must be a number from 0 on"),
            ("ends of blocks", "data.unit=blocks model.length_model=categorical", "set it to none"),
            ("no such posterior", "model.posterior=site", "expected one of .*sites.*, got site"),
        )
    ),
    # ---- sweeps
    Row("sweep: a recipe", "sweep small.yaml", "a sweep is a mapping with the key studies"),
    Row("sweep: texts", "sweep texts.txt", "a sweep is a mapping"),
    Row("sweep: override", "sweep sweep.yaml model.beta", "not of the form section.key=value, as"),
    Row("sweep: nested", "sweep a.yaml", "a.yaml: not valid YAML: it is nested", write("a.yaml", "a: " + DEEP)),
    Row(
        "sweep: no recipe",
        "sweep a.yaml",
        "no.yaml cannot be read: .*: check its path",
        write("a.yaml", "recipe: no.yaml\nstudies: {a: {runs: {b: {}}}}"),
    ),
    Row("sweep: jobs", "sweep sweep.yaml --jobs 99999999999", "jobs are too many for .* cores: give at most"),
    # ---- numbers
    *(
        Row(f"number: {setting[:60]}", f"train small.yaml {setting}", says)
        for setting, says in (
            (f"model.latents_per_layer={10**11}", "latents_per_layer must be at most"),
            ("model.hidden_size=1048576", "needs at least .* GiB of memory .*: make hidden_size"),
            (f"model.hidden_size={10**30}", "hidden_size must be at most"),
            ("model.num_hidden_layers=1000000", "num_hidden_layers must be at most"),
            (f"model.inference_steps={10**24}", "inference_steps must be at most"),
            ("model.inference_steps=-1", "inference_steps must be at least 0"),
            ("model.latents_per_layer=-2", "latents_per_layer must be at least 1"),
            ("model.beta=1e300", "beta must be at most"),
            ("data.length=-1", "length must be at least 1"),
            (f"data.length={10**12}", "length must be .* at most"),
            (f"data.vocab_size={10**12}", "vocab_size must be at most"),
            ("data.vocab_size=256", "vocab_size must be at least 257"),
            ("data.tokenizer=words data.vocab_size=2", "vocab_size must be at least 3"),
            ("data.limit=-3", "limit must be at least 1"),
            ("training.max_steps=-5", "must not be negative"),
            ("training.per_device_train_batch_size=0", "must be at least 1"),
            (f"training.per_device_train_batch_size={10**12}", "cannot be meant: give less"),
            ("training.dataloader_num_workers=99999", "too many for .* cores"),
            ("training.seed=-1", "must not be negative"),
            ("training.seed=5000000000", r"must be less than 2\*\*32"),
            (f"training.max_steps={10**400}", "must not be negative or NaN or infinite|cannot be meant: give less"),
            ("evaluation.iw_samples=-2", "iw_samples must be at least 1"),
        )
    ),
    Row("number: seed", f"evaluate model --seed {10**30}", "--seed must fit in 64 bits: give a smaller"),
    Row("number: seed of generate", "generate model --seed 99999999999999999999", "--seed must fit in 64 bits: give"),
    Row(
        "number: seed of encode", f"encode model --text a --output x.npz --seed -{10**30}", "--seed must fit in 64 bits"
    ),
    Row("number: seed of quickstart", "quickstart --seed -1", "seed must not be negative"),
    Row("number: threads", f"--threads {10**30} evaluate model", "--threads.* less than or equal"),
    Row("number: texts", f"generate model -n {10**14}", "--number.* less than or equal"),
    Row("number: beams", f"generate model --beams {10**12} --prompt a", "--beams.* less than or equal"),
    Row("number: samples", f"evaluate model --iw-samples {10**15}", "--iw-samples.* less than or equal"),
    Row("number: limit", "evaluate model --data texts.txt --limit 0", "limit.* greater than or equal"),
    Row("number: --set", "evaluate model --set inference_steps=-1", "inference_steps must be at least 0"),
    Row("number: --set of a word", "evaluate model --set inference_steps=many", "inference_steps"),
    Row("number: every", "generate model --reinfer-every 0", "--reinfer-every.* greater than or equal"),
    # ---- training that diverges
    Row(
        "not finite: loss",
        f"train small.yaml --output run {DIVERGING}",
        "finite number.*: lower|diverged.*; lower",
        leaves=True,
    ),
    Row(
        "not finite: loss of a control",
        f"train control.yaml --output run {DIVERGING}",
        "diverged.* step [0-9].*lower",
        lambda folder: (folder / "control.yaml").write_text(
            (folder / "control" / "recipe.yaml").read_text().replace("max_steps: 3", "max_steps: 9")
        ),
        leaves=True,
    ),
    Row("not finite: rate", "train small.yaml training.learning_rate=.nan", "must not be negative or NaN or infinite"),
    Row("not finite: temperature", "generate model --temperature nan", "--temperature must be at least .*--greedy"),
    # ---- options that do not go together
    Row(
        "options: text twice", "encode model --text a --data texts.txt --output x.npz", "either by --text or by --data"
    ),
    Row("options: no text", "encode model --output x.npz", "either by --text or by --data"),
    Row("options: protocol", "evaluate model --protocol fancy", "protocol must be honest or paper"),
    Row("options: reinfer", "evaluate model --reinfer-every 4", "give prompt_tokens, too"),
    Row(
        "options: reinfer with beams",
        "generate model --reinfer-every 2 --beams 2 --max-new-tokens 4",
        "neither with beams",
    ),
    Row("options: beams", "generate model -n 3 --beams 2", "--beams 2 gives at most 2 texts"),
    Row(
        "options: sample by", "evaluate model --data texts.txt --sample-by page", "'page' is unknown: give one of line"
    ),
]
