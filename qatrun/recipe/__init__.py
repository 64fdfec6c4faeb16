"""Recipes: what a study does, as data. Torch-free, so that a mistake is reported before anything heavy is imported."""

from qatrun.recipe.calibrated import calibrated_alone
from qatrun.recipe.loader import load_recipe, locate, parse_recipe
from qatrun.recipe.monitor import AlarmConfig, DiagnoseConfig, MonitorConfig, ProbeConfig
from qatrun.recipe.qat import (
    CalibrationConfig,
    ModuleConfig,
    QatConfig,
    RoleConfig,
    RoleScaling,
    SavedActivations,
    ScalingConfig,
    SkipBlocks,
)
from qatrun.recipe.schema import DEFAULT_BUDGET_PP, Arm, Recipe, json_schema
from qatrun.recipe.sections import DataConfig, EvalConfig, ModelConfig, Source, TrainConfig, WarmupConfig
from qatrun.recipe.shipped import ShippedRecipe, find_recipe, shipped_recipes, template

__all__ = [
    "DEFAULT_BUDGET_PP",
    "AlarmConfig",
    "Arm",
    "CalibrationConfig",
    "DataConfig",
    "DiagnoseConfig",
    "EvalConfig",
    "ModelConfig",
    "ModuleConfig",
    "MonitorConfig",
    "ProbeConfig",
    "QatConfig",
    "Recipe",
    "RoleConfig",
    "RoleScaling",
    "SavedActivations",
    "ScalingConfig",
    "ShippedRecipe",
    "SkipBlocks",
    "Source",
    "TrainConfig",
    "WarmupConfig",
    "calibrated_alone",
    "find_recipe",
    "json_schema",
    "load_recipe",
    "locate",
    "parse_recipe",
    "shipped_recipes",
    "template",
]
