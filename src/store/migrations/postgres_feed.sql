-- The change feed: triggers that announce every change that can change a decision, whoever makes it.
--
-- Announced is what changed (prefixes, a user) and by which transaction, never a hash or a name. The message carries no
-- authority: a forged one makes a record be read again, and that is all.
--
-- Only rows whose decision columns changed are announced. last_used_at, counters and last_login change with the traffic,
-- and every NOTIFY takes a lock of the whole database at its commit. Compared is inside the function and not in WHEN or
-- UPDATE OF: those would stand in the way of the platform's own ALTER TABLE, and UPDATE OF misses what other triggers
-- change. Columns are compared as JSON, as json itself has no equality, and by name, so that columns may come and go.
--
-- The function never fails a write of the platform: what goes wrong in it becomes the message "anything may have
-- changed". It runs as its owner, so that a writer's missing rights don't silence it, and looks nothing up.
--
-- Running this again changes nothing, not even the version of a catalogue row: a running sidecar watches those.

DO $migrate$
BEGIN
    IF to_regprocedure('keyward_notify_v1()') IS NULL THEN
        CREATE FUNCTION keyward_notify_v1() RETURNS trigger
        LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $function$
        DECLARE
            -- From there on a transaction announces that anything may have changed; equal messages become one.
            most_changes CONSTANT integer := 100;
            -- A payload has room for 8000 bytes.
            longest_prefix CONSTANT integer := 128;
            -- Changes with every request, and decides nothing.
            traffic CONSTANT text[] := ARRAY[
                'last_used_at', 'last_login', 'updated_at', 'total_requests', 'total_tokens', 'total_cost'
            ];
            decides text[];
            before json;
            after json;
            counted text;
            prefixes text[] := '{}';
            ids bigint[] := '{}';
            changed_id bigint;
        BEGIN
            IF TG_OP = 'UPDATE' THEN
                -- The quick way out, for the traffic; what jsonb refuses goes the long way.
                BEGIN
                    IF to_jsonb(OLD) - traffic = to_jsonb(NEW) - traffic THEN
                        RETURN NULL;
                    END IF;
                EXCEPTION WHEN OTHERS THEN
                    NULL;
                END;
            END IF;

            -- Escapes are made harmless: a NUL or half a surrogate is allowed in json and not in text.
            IF TG_LEVEL = 'ROW' THEN
                before := CASE WHEN TG_OP <> 'INSERT' THEN replace(to_json(OLD)::text, '\u', '\/u')::json END;
                after := CASE WHEN TG_OP <> 'DELETE' THEN replace(to_json(NEW)::text, '\u', '\/u')::json END;
            END IF;
            IF TG_OP = 'UPDATE' THEN
                decides := CASE TG_ARGV[0]
                    WHEN 'users' THEN ARRAY[
                        'id', 'username', 'email', 'is_active', 'is_superuser', 'role', 'role_id', 'account_locked',
                        'account_locked_until'
                    ]
                    ELSE ARRAY[
                        'id', 'name', 'key_hash', 'key_prefix', 'user_id', 'is_active', 'permissions', 'scopes',
                        'rate_limit_per_minute', 'rate_limit_per_hour', 'rate_limit_per_day', 'allowed_models',
                        'allowed_endpoints', 'allowed_ips', 'allowed_chatbots', 'allowed_agents', 'is_unlimited',
                        'budget_limit_cents', 'budget_type', 'expires_at'
                    ]
                END;
                IF (SELECT array_agg(value::text) FROM json_each(before) WHERE key = ANY (decides))
                    IS NOT DISTINCT FROM
                    (SELECT array_agg(value::text) FROM json_each(after) WHERE key = ANY (decides))
                THEN
                    RETURN NULL;
                END IF;
            END IF;

            -- Of this transaction; whatever else stands there is not ours.
            counted := current_setting('keyward.changes', true);
            IF counted IS NULL OR counted !~ '^[0-9]{1,6}$' THEN
                counted := '0';
            END IF;
            IF TG_OP = 'TRUNCATE' OR counted::integer >= most_changes THEN
                PERFORM pg_notify('keyward_changes', json_build_object(
                    'v', 1, 'x', txid_current()::text, 'flush', true)::text);
                RETURN NULL;
            END IF;
            PERFORM set_config('keyward.changes', (counted::integer + 1)::text, true);

            IF TG_ARGV[0] = 'users' THEN
                IF TG_OP <> 'INSERT' THEN
                    ids := ids || OLD.id::bigint;
                END IF;
                IF TG_OP <> 'DELETE' THEN
                    ids := ids || NEW.id::bigint;
                END IF;
                FOREACH changed_id IN ARRAY ids LOOP
                    PERFORM pg_notify('keyward_changes', json_build_object(
                        'v', 1, 'x', txid_current()::text, 'u', changed_id, 'p', ARRAY[]::text[])::text);
                END LOOP;
                RETURN NULL;
            END IF;

            IF TG_OP <> 'INSERT' THEN
                prefixes := prefixes || OLD.key_prefix::text;
            END IF;
            IF TG_OP <> 'DELETE' THEN
                prefixes := prefixes || NEW.key_prefix::text;
            END IF;
            prefixes := array_remove(prefixes, NULL);
            IF (SELECT max(octet_length(prefix)) FROM unnest(prefixes) AS prefix) > longest_prefix THEN
                PERFORM pg_notify('keyward_changes', json_build_object(
                    'v', 1, 'x', txid_current()::text, 'flush', true)::text);
            ELSE
                PERFORM pg_notify('keyward_changes', json_build_object(
                    'v', 1, 'x', txid_current()::text, 'u', NULL, 'p', prefixes)::text);
            END IF;
            RETURN NULL;
        EXCEPTION WHEN OTHERS THEN
            BEGIN
                PERFORM pg_notify('keyward_changes', '{"flush":true}');
            EXCEPTION WHEN OTHERS THEN
                RAISE WARNING 'keyward: a change of % was not announced: %', TG_TABLE_NAME, SQLERRM;
            END;
            RETURN NULL;
        END
        $function$;
    END IF;
END
$migrate$;

DO $migrate$
DECLARE
    watched text;
    wanted record;
BEGIN
    FOREACH watched IN ARRAY ARRAY['api_keys', 'users'] LOOP
        -- A view has no rows of its own to watch; serve says that nothing announces them.
        CONTINUE WHEN NOT EXISTS (
            SELECT FROM pg_catalog.pg_class WHERE oid = to_regclass(watched) AND relkind IN ('r', 'p'));
        FOR wanted IN SELECT * FROM (VALUES
            ('keyward_changes', 'INSERT OR UPDATE OR DELETE', 'ROW'),
            ('keyward_truncate', 'TRUNCATE', 'STATEMENT')) AS triggers (name, events, level)
        LOOP
            IF NOT EXISTS (
                SELECT FROM pg_catalog.pg_trigger WHERE tgrelid = to_regclass(watched) AND tgname = wanted.name)
            THEN
                EXECUTE format(
                    'CREATE TRIGGER %I AFTER %s ON %I FOR EACH %s EXECUTE PROCEDURE keyward_notify_v1(%L)',
                    wanted.name, wanted.events, watched, wanted.level, watched);
            END IF;
            -- For replicated changes too (session_replication_role), and again where somebody switched it off.
            IF EXISTS (
                SELECT FROM pg_catalog.pg_trigger
                WHERE tgrelid = to_regclass(watched) AND tgname = wanted.name AND tgenabled <> 'A')
            THEN
                EXECUTE format('ALTER TABLE %I ENABLE ALWAYS TRIGGER %I', watched, wanted.name);
            END IF;
        END LOOP;
    END LOOP;
END
$migrate$;
