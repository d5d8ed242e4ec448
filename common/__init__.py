"""The well-tested parts that the recipes share, in rooms.

Data flows one way: corpus, tokens, dataset, model, train, run.

Importing any of it first keeps libraries quiet, because some of them speak while they are imported.
"""

from common.console import quiet_libraries

quiet_libraries()
