-- The condition of the leases of a batch: ids $1 under the tokens $2.
--
-- Plan: each row by the primary key, with any statistics. A join of the ids with the table leaves the planner another way,
-- to read all of an index once and compare each pair, and a session that has planned on a small table keeps to it. The
-- pairs are a hashed set: the planner cannot turn an IN of which only TRUE counts into a join. While this statement waits
-- for a row, another may change its token: the server compares the pair again.
    WHERE id = ANY ($1::uuid[])
      AND ((id, locked_by) IN (SELECT * FROM unnest($1::uuid[], $2::uuid[]))) IS TRUE
