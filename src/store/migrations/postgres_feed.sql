-- The change feed: whoever changes a key or a user, by whatever program, tells every Keyward at commit.
--
-- One message a changed row on the channel keyward_changes; "x" is the transaction:
--     {"v": 1, "x": "742", "u": null, "p": ["kw_01234"]}    a key, or an old secret; its prefix before and after
--     {"v": 1, "x": "742", "u": 3, "p": []}                 a user; one who gets another id is two messages
--     {"v": 1, "x": "742", "flush": true}                   anything may have changed
-- Equal messages of a transaction arrive once. From the 101st change of a transaction on, each sends the flush, so that
-- a mass change costs its writer and its readers no more than that.
--
-- The tables belong to another program, whose writes must go on as if there were no feed:
--   * The triggers name no column, neither in UPDATE OF nor in WHEN: Postgres would then refuse to drop or to retype
--     the column. UPDATE OF would miss what a BEFORE trigger sets, too.
--   * The function raises nothing but the end of a cancelled statement. What goes wrong becomes a flush, and what goes
--     wrong with that a warning.
--   * It is not SECURITY DEFINER: the casts of a column's type are code of the table's owner, who would get to run it
--     with the rights of whoever migrated. NOTIFY needs no rights, unlike pg_notify(), so nothing is lost.
--   * The search path is fixed, so that no operator or function of the writer's schemas is taken for Postgres's own.
--     No table of ours is looked up.
--   * ENABLE ALWAYS: a replica that applies a primary's changes serves keys, too.
-- What it does cost: Postgres refuses PREPARE TRANSACTION after a NOTIFY.
--
-- Run again it changes no row of the catalogue. The function's name carries its version: one of that name is right.

DO $migration$
DECLARE
    watched text;
    relation regclass;
BEGIN
    IF to_regprocedure('keyward_notify_v1()') IS NULL THEN
        CREATE FUNCTION keyward_notify_v1() RETURNS trigger LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
        AS $function$
        -- No initial values: an error in one would be outside of the block that catches errors.
        DECLARE
            rest record;
            changed boolean;
            subject text;
            former text;
            latter text;
            transaction text;
            counter text;
            counted integer;
            message json;
        BEGIN
            -- The argument and not the table's name: a partition has a name of its own.
            subject := CASE TG_ARGV[0] WHEN 'users' THEN 'id' ELSE 'key_prefix' END;

            IF TG_OP = 'UPDATE' THEN
                -- Nearly every update counts traffic, and has to be cheap: nothing else differs.
                -- Bytes are compared, because json has no equality and some collations take different texts for equal.
                BEGIN
                    rest := OLD;
                    IF TG_ARGV[0] = 'users' THEN
                        rest.last_login := NEW.last_login;
                    ELSE
                        rest.total_requests := NEW.total_requests;
                        rest.total_tokens := NEW.total_tokens;
                        rest.total_cost := NEW.total_cost;
                        rest.last_used_at := NEW.last_used_at;
                    END IF;
                    rest.updated_at := NEW.updated_at;
                    IF rest *= NEW THEN
                        RETURN NULL;
                    END IF;
                EXCEPTION WHEN OTHERS THEN
                    -- One of them is missing, or was retyped since this session planned this.
                    NULL;
                END;

                -- What decides, of what there is now.
                EXECUTE (
                    SELECT format(
                        'SELECT ROW(%s)::record *<> ROW(%s)::record',
                        string_agg(format('($1).%I', attname), ', '),
                        string_agg(format('($2).%I', attname), ', ')
                    )
                    FROM pg_attribute
                    WHERE attrelid = TG_RELID AND attnum > 0 AND NOT attisdropped AND attname = ANY (
                        CASE TG_ARGV[0] WHEN 'users' THEN ARRAY[
                            'id', 'username', 'email', 'is_active', 'is_superuser', 'role', 'role_id',
                            'account_locked', 'account_locked_until'
                        ] ELSE ARRAY[
                            'id', 'name', 'key_hash', 'key_prefix', 'user_id', 'is_active', 'permissions', 'scopes',
                            'rate_limit_per_minute', 'rate_limit_per_hour', 'rate_limit_per_day', 'allowed_models',
                            'allowed_endpoints', 'allowed_ips', 'allowed_chatbots', 'allowed_agents', 'is_unlimited',
                            'budget_limit_cents', 'budget_type', 'expires_at'
                        ] END
                    )
                ) INTO changed USING OLD, NEW;
                IF NOT changed THEN
                    RETURN NULL;
                END IF;
            END IF;

            transaction := txid_current();
            message := json_build_object('v', 1, 'x', transaction, 'flush', true);

            IF TG_OP <> 'TRUNCATE' THEN
                -- With the transaction in it: a value that someone else set counts for nothing. It ends with the
                -- transaction, and is undone with a savepoint just as the messages are.
                counter := current_setting('keyward.changes', true);
                counted := CASE
                    WHEN split_part(counter, ':', 1) = transaction AND split_part(counter, ':', 2) ~ '^[0-9]{1,3}$'
                    THEN split_part(counter, ':', 2)::integer
                    ELSE 0
                END;
                IF counted < 100 THEN
                    PERFORM set_config('keyward.changes', transaction || ':' || counted + 1, true);
                    -- Planned anew each time, since the column's type may change. The cast strips char(n)'s padding,
                    -- just as the lookup does.
                    IF TG_OP <> 'INSERT' THEN
                        EXECUTE format('SELECT ($1).%I::text', subject) INTO former USING OLD;
                    END IF;
                    IF TG_OP <> 'DELETE' THEN
                        EXECUTE format('SELECT ($1).%I::text', subject) INTO latter USING NEW;
                    END IF;
                    IF former IS NOT DISTINCT FROM latter THEN
                        latter := NULL;
                    END IF;
                    -- A message has at most 8000 bytes; and in a database without an encoding, what is not ASCII could
                    -- be bytes that its reader rejects, and with them the connection.
                    IF coalesce(greatest(octet_length(former), octet_length(latter)), 0) <= 128
                        AND concat(former, latter) COLLATE "C" !~ '[^ -~]'
                    THEN
                        IF TG_ARGV[0] = 'users' THEN
                            -- A message has one user.
                            FOREACH subject IN ARRAY array_remove(ARRAY[former, latter], NULL) LOOP
                                message := json_build_object(
                                    'v', 1, 'x', transaction, 'u', subject::bigint, 'p', ARRAY[]::text[]
                                );
                                EXECUTE format('NOTIFY keyward_changes, %L', message);
                            END LOOP;
                            RETURN NULL;
                        END IF;
                        message := json_build_object(
                            'v', 1, 'x', transaction, 'u', NULL, 'p', array_remove(ARRAY[former, latter], NULL)
                        );
                    END IF;
                END IF;
            END IF;
            EXECUTE format('NOTIFY keyward_changes, %L', message);
            RETURN NULL;
        EXCEPTION WHEN OTHERS THEN
            BEGIN
                -- Calls no function: the right to call one may be what was missing. So the transaction is not known.
                NOTIFY keyward_changes, '{"v": 1, "x": "0", "flush": true}';
            EXCEPTION WHEN OTHERS THEN
                RAISE WARNING 'keyward is not told of this change: %', SQLERRM;
            END;
            RETURN NULL;
        END
        $function$;
    END IF;

    FOREACH watched IN ARRAY ARRAY['api_keys', 'users', 'keyward_old_secrets'] LOOP
        -- A view has no rows of its own that could change.
        SELECT c.oid INTO relation
        FROM pg_catalog.pg_class c
        WHERE c.oid = to_regclass(watched) AND c.relkind IN ('r', 'p');
        CONTINUE WHEN relation IS NULL;

        IF NOT EXISTS (
            SELECT FROM pg_catalog.pg_trigger WHERE tgrelid = relation AND tgname = 'keyward_changes'
        ) THEN
            EXECUTE format(
                'CREATE TRIGGER keyward_changes AFTER INSERT OR UPDATE OR DELETE ON %s '
                'FOR EACH ROW EXECUTE FUNCTION keyward_notify_v1(%L)', relation, watched
            );
        END IF;
        IF NOT EXISTS (
            SELECT FROM pg_catalog.pg_trigger WHERE tgrelid = relation AND tgname = 'keyward_truncate'
        ) THEN
            EXECUTE format(
                'CREATE TRIGGER keyward_truncate AFTER TRUNCATE ON %s '
                'FOR EACH STATEMENT EXECUTE FUNCTION keyward_notify_v1(%L)', relation, watched
            );
        END IF;
    END LOOP;

    -- Where it is so already, the catalogue stays as it is.
    FOR relation, watched IN
        SELECT t.tgrelid, t.tgname
        FROM pg_catalog.pg_trigger t
        JOIN pg_catalog.pg_class c ON c.oid = t.tgrelid
        WHERE t.tgrelid IN (to_regclass('api_keys'), to_regclass('users'), to_regclass('keyward_old_secrets'))
            AND c.relkind IN ('r', 'p') AND t.tgname IN ('keyward_changes', 'keyward_truncate') AND t.tgenabled <> 'A'
    LOOP
        EXECUTE format('ALTER TABLE %s ENABLE ALWAYS TRIGGER %I', relation, watched);
    END LOOP;
END
$migration$;
