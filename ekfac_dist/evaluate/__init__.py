"""How good attributions are: models are retrained, and scores compared with what that did.

Lowest first:

training    one training run by the stated recipe, of all sequences or of some
bank        the losses of the queries after training on subsets: stored, resumed, reused
subsets     which sequences are left out
methods     scores of each method that is compared
measures    rank correlations, ranks, and their bootstrap intervals: numbers only
protocols   what is measured: LDS, removal, tail patch, recall
results     the format of results.json, with its writer and its reader
run         all of it, from text to a table
"""
