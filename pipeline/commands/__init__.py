"""The commands of `align`: a module for each, and the list that the command line is made from."""

from pipeline.commands.cache_ref import CACHE_REF
from pipeline.commands.evaluate import EVALUATE
from pipeline.commands.inspect import INSPECT
from pipeline.commands.merge import MERGE
from pipeline.commands.plan import PLAN
from pipeline.commands.prepare import PREPARE
from pipeline.commands.run import RUN
from pipeline.commands.sample import SAMPLE
from pipeline.commands.train import TRAIN

# In the order of `align --help`.
LISTED = (PREPARE, CACHE_REF, TRAIN, SAMPLE, PLAN, MERGE, EVALUATE, RUN, INSPECT)
COMMANDS = {command.name: command for command in LISTED}
