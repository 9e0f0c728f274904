"""The commands of `align`, one module each. The command line is made from the list below."""

from pipeline.commands.cache_ref import CACHE_REF
from pipeline.commands.compare import COMPARE
from pipeline.commands.diff import DIFF
from pipeline.commands.doctor import DOCTOR
from pipeline.commands.evaluate import EVALUATE
from pipeline.commands.export import EXPORT, IMPORT
from pipeline.commands.gc import GC
from pipeline.commands.init import INIT
from pipeline.commands.inspect import INSPECT
from pipeline.commands.judge import JUDGE
from pipeline.commands.ls import LS
from pipeline.commands.merge import MERGE
from pipeline.commands.online import ONLINE
from pipeline.commands.plan import PLAN
from pipeline.commands.prepare import PREPARE
from pipeline.commands.report import REPORT
from pipeline.commands.run import RUN
from pipeline.commands.sample import SAMPLE
from pipeline.commands.show import SHOW
from pipeline.commands.sweep import SWEEP
from pipeline.commands.train import TRAIN
from pipeline.commands.verify import VERIFY

# In the order of `align --help`.
LISTED = (
    PREPARE,
    CACHE_REF,
    TRAIN,
    SAMPLE,
    RUN,
    SWEEP,
    JUDGE,
    COMPARE,
    REPORT,
    ONLINE,
    EVALUATE,
    MERGE,
    PLAN,
    INSPECT,
    LS,
    SHOW,
    DIFF,
    VERIFY,
    EXPORT,
    IMPORT,
    GC,
    INIT,
    DOCTOR,
)
COMMANDS = {command.name: command for command in LISTED}
