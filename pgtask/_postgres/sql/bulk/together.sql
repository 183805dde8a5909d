-- For the rest of this transaction, the triggers of 021 leave to the statements of bulk/ what they do for all tasks
-- together.
SELECT set_config('pgtask.bulk', 'on', true)
