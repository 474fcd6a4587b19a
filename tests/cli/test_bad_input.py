"""Command lines and environments that are wrong: one line that names the culprit, exit code 2, nothing written."""

import pytest

from tests.cli.refused import refused
from tests.cli.test_commands import config  # noqa: F401  (a fixture)

OPTIMIZER = "model.init_args.optimizer"
TRAINER = [
    ("accelerator gpu", "No supported gpu backend found! (lightning/"),
    ("accelerator quantum", "invalid accelerator name: `accelerator='quantum'`"),
    ("devices 0", "`Trainer(devices='0')` value is not a valid input"),
    ("devices -3", "`devices` selected with `CPUAccelerator` should be an int > 0"),
    ("devices abc", "`devices` selected with `CPUAccelerator` should be an int > 0"),
    ("num_nodes 0", "`num_nodes`"),
    ("max_epochs 1.5", "`trainer.max_epochs`, got 1.5"),
    ("max_epochs few", "`trainer.max_epochs`, got few"),
    ("max_epochs -5", "`max_epochs`"),
    ("max_epochs=", "`trainer.max_epochs`, got '': Expected a int"),
    ("max_steps abc", "`trainer.max_steps`, got abc"),
    ("max_steps -7", "`max_steps`"),
    ("min_epochs x", "`trainer.min_epochs`, got x"),
    ("max_time 3", "duration='3'"),
    ("limit_train_batches 1.5", "1.5 for limit_train_batches"),
    ("limit_train_batches -1", "-1 for limit_train_batches"),
    ("limit_val_batches abc", "`trainer.limit_val_batches`, got abc"),
    ("val_check_interval 0", "`trainer.val_check_interval`, got 0"),
    ("val_check_interval -1", "`trainer.val_check_interval`, got -1"),
    ("val_check_interval 2.5", "2.5 for val_check_interval"),
    ("num_nodes 3", "MASTER_ADDR for `trainer.num_nodes` 3, got none"),
    ("check_val_every_n_epoch 0", "`trainer.check_val_every_n_epoch`, got 0"),
    ("check_val_every_n_epoch -1", "`trainer.check_val_every_n_epoch`, got -1"),
    ("log_every_n_steps -1", "`trainer.log_every_n_steps`, got -1"),
    ("num_sanity_val_steps -2", "`trainer.num_sanity_val_steps`, got -2"),
    ("accumulate_grad_batches 2", "model.init_args.accumulate_grad_batches: 2"),
    ("gradient_clip_val -1", "`gradient_clip_val`"),
    ("gradient_clip_algorithm foo", "`gradient_clip_algorithm` foo"),
    ("precision 8", "`trainer.precision`, got 8"),
    ("precision half", "`trainer.precision`, got half"),
    ("strategy foo", "invalid strategy name: `strategy='foo'`"),
    ("strategy fsdp", "`fsdp`"),
    (
        "profiler foo",
        "`profiler` parameter of `Trainer`, it can only be one of ['simple', 'advanced', 'pytorch', 'xla']",
    ),
    ("plugins foo", "`trainer.plugins`, got foo"),
    ("benchmark maybe", "`trainer.benchmark`, got maybe"),
    ("barebones true", "`Trainer(barebones=True, logger=["),
    ("sync_batchnorm 3", "`trainer.sync_batchnorm`, got 3"),
    ("fast_dev_run -1", "fast_dev_run=-1"),
    ("overfit_batches 2.5", "2.5 for overfit_batches"),
    ("default_root_dir /proc/nowhere", "'/proc/nowhere'"),
    ("default_root_dir cube.npy", "cube.npy"),
    ("logger foo", "TensorBoardLogger, WandbLogger, got 'foo'"),
    ("logger TensorBoardLogger", "TensorBoardLogger': the following arguments are required: save_dir"),
    ("logger.save_dir x", "`trainer.logger`, got x"),
    ("callbacks foo", "`trainer.callbacks`"),
    ("callbacks 3", "'3'"),
    ("callbacks+=EarlyStoping", "EarlyStopping"),
    ("callbacks+=EarlyStopping", "EarlyStopping': the following arguments are required: monitor"),
    ("callbacks+=EarlyStopping --trainer.callbacks.monitor=nope", "`monitor` of EarlyStopping, got 'nope'"),
    ("callbacks+=EarlyStopping --trainer.callbacks.monitor=val/r2 --trainer.callbacks.mode=up", "got up"),
    ("callbacks+=ModelCheckpoint --trainer.callbacks.monitor=nope", "`monitor` of ModelCheckpoint, got 'nope'"),
    ("callbacks+=ModelCheckpoint --trainer.callbacks.save_top_k=-4", "save_top_k=-4"),
    ("callbacks+=LearningRateMonitor --trainer.callbacks.logging_interval=foo", "logging_interval`, got foo"),
    ("callbacks+=NormDynamicsMonitor --trainer.callbacks+=NormDynamicsMonitor", "one NormDynamicsMonitor"),
    ("callbacks+=ModelCheckpoint --trainer.callbacks+=ModelCheckpoint", "one ModelCheckpoint with these settings"),
    (
        f"{'callbacks+=EarlyStopping --trainer.callbacks.monitor=train/loss --trainer.' * 2}max_epochs=2",
        "EarlyStopping",
    ),
    ("callbacks+=DeviationAwareScaling", "DeviationAwareScaling': the following arguments are required: alpha"),
    ("callbacks+=DeviationAwareScaling --trainer.callbacks.alpha=nan", "`trainer.callbacks.alpha`, got nan"),
    ("callbacks+=DeviationAwareScaling --trainer.callbacks.alpha=-1", "`alpha`, got -1"),
    ("enable_checkpointing false --trainer.callbacks+=ModelCheckpoint", "enable_checkpointing=False"),
    ("foo.bar 3", "under `trainer`, got 'trainer.foo.bar'"),
    ("max_epoch 3", "max_epochs"),
]
MODEL = [
    ("model 3", "CompletionTask, DistillationTask, ImageClassificationTask, TextClassificationTask, got '3'"),
    (
        "model []",
        "a class in `model`, one of CausalLMTask, CompletionTask, DistillationTask, ImageClassificationTask, "
        "TextClassificationTask, got '[]'",
    ),
    ("model null", "arguments are required: fit.model"),
    ("model CompletionTusk", "'CompletionTusk'"),
    (
        "model ImageClassificationTask",
        "`model`: Problem with given class_path 'tenzoo.tasks.ImageClassificationTask': the following arguments are "
        "required: network",
    ),
    ("model.rnak.depth 3", "rank"),
    ("model.init_args.rnak 3", "'rnak'"),
    ("model.init_args.rank 0", "`rank`, got 0"),
    ("model.init_args.rank -1", "`rank`, got -1"),
    ("model.init_args.rank 1.7", "`rank`, got 1.7"),
    ("model.init_args.rank nan", "`model.rank`, got nan"),
    ("model.init_args.rank true", "`model.rank`, got True"),
    ("model.init_args.rank null", "`rank`, got None"),
    ("model.init_args.rank []", "`rank` for this shape, got 0"),
    ("model.init_args.rank [1,2,3]", "`rank` for this shape, got 3"),
    ("model.init_args.rank {a:1}", "`model.rank`, got {a:1}"),
    ("model.init_args.rank 1000000000000000000", "fit into memory"),
    ("model.init_args.factorization cpp", "`factorization`, got 'cpp'"),
    ("model.init_args.factorization null", "`factorization`, got None"),
    ("model.init_args.init_std -1", "`init_std`, got -1"),
    ("model.init_args.reduction max", "`model.reduction`, got max"),
    ("model.init_args.shape abc", "`model.shape`, got abc"),
    ("model.init_args.shape [0,1,2]", "`shape`, got (0, 1, 2)"),
    ("model.init_args.sam.rho -1", "`sam.rho`"),
    ("model.init_args.sam.rho nan", "`model.sam.rho`, got nan"),
    ("model.init_args.sam.radius 1", "'radius'"),
    ("model.init_args.sam 3", "`model.sam`"),
    ("model.init_args.gradient_clip_val -1", "`gradient_clip_val`, got -1"),
    (f"{OPTIMIZER} null", "`optimizer`, got None"),
    (f"{OPTIMIZER} 3", "`model.optimizer`"),
    (f"{OPTIMIZER} Adm", "AdamW"),
    (f"{OPTIMIZER} math.sqrt", "math.sqrt"),
    (f"{OPTIMIZER}.lr -1", "Invalid learning rate: -1.0 (torch/optim/adam.py:"),
    (f"{OPTIMIZER}.lr inf", "`model.optimizer.lr`, got inf"),
    (f"{OPTIMIZER}.foo 1", "'foo'"),
    (f"{OPTIMIZER} SGD --{OPTIMIZER}.momentum=-1", "Invalid momentum value: -1.0 (torch/optim/sgd.py:"),
    (
        f"{OPTIMIZER} SGD --{OPTIMIZER}.nesterov=true",
        "Nesterov momentum requires a momentum and zero dampening (torch/optim/sgd.py:",
    ),
    (f"{OPTIMIZER} LBFGS --model.init_args.sam.rho=0.1", "`sam`, got LBFGS"),
    ("model.init_args.lr_scheduler cosin", "'cosine'"),
    ("model.init_args.lr_scheduler StepLR", "required: step_size"),
    ("model.init_args.lr_scheduler StepLR --model.init_args.lr_scheduler.step_size=0", "`step_size`"),
    ("model.init_args.lr_scheduler CosineAnnealingLR --model.init_args.lr_scheduler.T_max=0", "`T_max`"),
    ("model.init_args.lr_scheduler ReduceLROnPlateau", "torch.optim.lr_scheduler.ReduceLROnPlateau"),
    ("model.init_args.lr_scheduler math.sqrt", "math.sqrt"),
]
DATA = [
    ("data 3", "CompletionDataModule"),
    ("data null", "arguments are required: fit.data"),
    ("data CompletionData", "'CompletionData'"),
    ("data.init_args.num_workers 1", "'num_workers'"),
    ("data.init_args.batch_size 0", "`batch_size`, got 0"),
    ("data.init_args.batch_size abc", "`data.batch_size`, got abc"),
    ("data.init_args.steps_per_epoch -2", "`steps_per_epoch`, got -2"),
    ("data.init_args.validation_fraction 1", "`validation_fraction`, got 1"),
    ("data.init_args.observed_fraction abc", "`data.observed_fraction`, got abc"),
    ("data.init_args.observed_fraction 0", "`observed_fraction`"),
    ("data.init_args.seed -1", "`seed`, got -1"),
    ("data.init_args.seed 1.5", "`data.seed`, got 1.5"),
    ("data.init_args.dataset null", "dataset"),
    ("data.init_args.dataset covd", "'covd'"),
    ("data.init_args.dataset .", "'.'"),
    ("data.init_args.dataset nowhere.npy", "nowhere.npy"),
    ("data.init_args.shape [2,2]", "`shape`"),
    ("data.init_args.standardize maybe", "`data.standardize`, got maybe"),
    ("data.init_args.predict_index nowhere.csv", "nowhere.csv"),
]
OTHERS = [
    ("seed_everything -3", "`seed_everything`, got -3"),
    ("seed_everything abc", "`seed_everything`, got abc"),
    ("seed_everything 99999999999", "`seed_everything`, got 99999999999"),
    ("ckpt_path .", "`ckpt_path`, got '.'"),
    ("ckpt_path nowhere.ckpt", "nowhere.ckpt"),
    ("ckpt_path", "--ckpt_path"),
    ("weights_only maybe", "`weights_only`, got maybe"),
    ("nonsense=1", "'nonsense'"),
    ("optimizer Adam", "'optimizer'"),
    ("trainer 3", '`trainer`: Unable to load config "3"'),
    ("config", "--config"),
    ("config nowhere.yaml", "nowhere.yaml"),
    ("config .", "`config`"),
]


@pytest.mark.sampled(14)
@pytest.mark.parametrize(
    ("option", "word"), [*((f"trainer.{name}", word) for name, word in TRAINER), *MODEL, *DATA, *OTHERS]
)
def test_options(config, capsys, monkeypatch, option, word):  # noqa: F811
    monkeypatch.chdir(config.parent)
    refused(capsys, config.parent, ["fit", "--config", str(config), *f"--{option}".split(" ")], [word])


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        ([], "predict, save, test, validate, got none"),
        (["fot"], "predict, save, test, validate, got 'fot'; did you mean 'fit'?"),
        ([""], "predict, save, test, validate, got ''"),
        (["fit"], "arguments are required: fit.data, fit.model"),
        (["fit", "fit"], "'fit'"),
        (["fit", "-x"], "'-x'"),
        (["validate", "--config", "config.yaml"], "`ckpt_path`, or `pretrained`, for validate, got none"),
        (["predict", "--config", "config.yaml"], "`ckpt_path`, or `pretrained`, for predict, got none"),
        (["completion"], "one of bash, zsh, fish for tenzoo completion, got none"),
        (["completion", "tcsh"], "bash, zsh, fish for tenzoo completion, got 'tcsh'"),
        (["list", "x"], "`PATTERN`, got 'x'"),
        (["list", "--configs"], "--configs"),
        (["list", "--configs", "nowhere"], "'nowhere'"),
        (["describe"], "arguments are required: data, model"),
        (["describe", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["describe", "--config", "config.yaml", "--data", "lightning.pytorch.LightningDataModule"], "`datamodule`"),
        (["compress"], "network, weights, output, factorization"),
        (["compress", "--nonsense", "1"], "'nonsense'"),
        (["compress", "--network", "CIFARResNt"], "CIFARResNet"),
        (["compress", "--budget", "half"], "`budget`, got half"),
        (["compress", "--ranks", "[a]"], "`ranks`"),
        (["compress", "--calibration", "3"], "`calibration`"),
    ],
    ids=" ".join,
)
def test_commands(config, capsys, monkeypatch, argv, word):  # noqa: F811
    monkeypatch.chdir(config.parent)
    refused(capsys, config.parent, argv, [word])


@pytest.mark.parametrize(
    ("variables", "culprit"),
    [
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE, got 'abc'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE, got '0'"),
        ({"WORLD_SIZE": "2.0"}, "WORLD_SIZE, got '2.0'"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE, got ''"),
        ({"RANK": "x"}, "RANK, got 'x'"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK, got '-1'"),
        ({"NODE_RANK": "one"}, "NODE_RANK, got 'one'"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT, got 'http'"),
        ({"SLURM_NTASKS": "abc"}, "SLURM_NTASKS, got 'abc'"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK, got 2 of 2"),
        ({"SLURM_PROCID": "4", "SLURM_NTASKS": "4"}, "SLURM_PROCID, got 4 of 4"),
    ],
    ids=str,
)
def test_environment(config, capsys, monkeypatch, variables, culprit):  # noqa: F811
    monkeypatch.chdir(config.parent)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    refused(capsys, config.parent, ["fit", "--config", str(config)], [f"environment variable {culprit}"])
