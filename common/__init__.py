"""The well-tested parts that the recipes share, in rooms.

Data flows one way: corpus, tokens, dataset, model, train, run.

Importing any of it first keeps libraries quiet, because some of them speak while they are imported. Imports take
seconds, in which Ctrl-C may come, too. Libraries keep the streams that they find, so these are prepared here, too.
"""

from common.console import one_line_for_ctrl_c, outlive_terminal, quiet_libraries

outlive_terminal()
quiet_libraries()
one_line_for_ctrl_c()
