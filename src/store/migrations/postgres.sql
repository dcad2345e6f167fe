-- The platform's schema, so that Keyward runs on its database as it stands and on an empty one alike.
-- Everything is IF NOT EXISTS, and no column of a table that exists is added, altered or dropped: such a table belongs
-- to another program, and Keyward reads what is there. Prefixes are not unique (different keys may begin alike);
-- hashes are. Timestamps have no time zone and are UTC, whatever the session's zone is.

CREATE TABLE IF NOT EXISTS users (
    id serial PRIMARY KEY,
    email varchar(255) UNIQUE,
    username varchar(255) UNIQUE,
    hashed_password varchar(255) NOT NULL,
    is_active boolean DEFAULT true,
    is_superuser boolean DEFAULT false,
    created_at timestamp without time zone DEFAULT timezone('utc', now()),
    updated_at timestamp without time zone DEFAULT timezone('utc', now()),
    last_login timestamp without time zone,
    role text DEFAULT 'user',
    account_locked boolean DEFAULT false,
    account_locked_until timestamp without time zone
);

CREATE TABLE IF NOT EXISTS api_keys (
    id serial PRIMARY KEY,
    name varchar(255),
    key_hash varchar(255) UNIQUE,
    key_prefix varchar(64),
    user_id integer REFERENCES users (id),
    is_active boolean DEFAULT true,
    permissions json,
    scopes json,
    rate_limit_per_minute integer,
    rate_limit_per_hour integer,
    rate_limit_per_day integer,
    allowed_models json,
    allowed_endpoints json,
    allowed_ips json,
    allowed_chatbots json,
    allowed_agents json,
    is_unlimited boolean DEFAULT false,
    budget_limit_cents integer,
    budget_type text DEFAULT 'total',
    description text,
    tags json,
    created_at timestamp without time zone DEFAULT timezone('utc', now()),
    updated_at timestamp without time zone DEFAULT timezone('utc', now()),
    last_used_at timestamp without time zone,
    expires_at timestamp without time zone,
    total_requests integer DEFAULT 0,
    total_tokens integer DEFAULT 0,
    total_cost integer DEFAULT 0
);

-- Secrets that a rotation replaced and that are good until expires_at, as long as key_hash of their key is the one that
-- replaced them: whoever else changes the key's hash, or takes its id, ends them. They have their key's prefix.
CREATE TABLE IF NOT EXISTS keyward_old_secrets (
    id serial PRIMARY KEY,
    key_id integer NOT NULL,
    key_hash text NOT NULL,
    key_prefix text NOT NULL,
    current_hash text NOT NULL,
    rotated_at timestamp without time zone NOT NULL,
    expires_at timestamp without time zone NOT NULL
);
CREATE INDEX IF NOT EXISTS ix_keyward_old_secrets_key_id ON keyward_old_secrets (key_id);

-- What was changed by command: never a secret or a hash.
CREATE TABLE IF NOT EXISTS keyward_history (
    id bigserial PRIMARY KEY,
    at timestamp without time zone NOT NULL,
    actor text NOT NULL,
    action text NOT NULL,
    key_id integer,
    user_id integer,
    changes json
);
CREATE INDEX IF NOT EXISTS ix_keyward_history_key_id ON keyward_history (key_id);

-- Whoever may read all keys may read these, too: a sidecar that can't would refuse secrets that are still good.
DO $$
DECLARE
    reader regrole;
BEGIN
    FOR reader IN
        SELECT acl.grantee::regrole
        FROM pg_catalog.pg_class c, LATERAL aclexplode(c.relacl) acl
        WHERE c.oid = to_regclass('api_keys') AND acl.privilege_type = 'SELECT' AND acl.grantee <> 0
            AND NOT has_table_privilege(acl.grantee, 'keyward_old_secrets', 'SELECT')
    LOOP
        EXECUTE format('GRANT SELECT ON keyward_old_secrets TO %s', reader);
    END LOOP;
END
$$;

-- By the column and not by the index's name: the platform's own indexes have other names.
DO $$
DECLARE
    wanted text;
BEGIN
    FOREACH wanted IN ARRAY ARRAY['key_prefix', 'user_id'] LOOP
        IF EXISTS (
            SELECT FROM pg_catalog.pg_class c
            WHERE c.oid = to_regclass('api_keys') AND c.relkind IN ('r', 'p')
        ) AND NOT EXISTS (
            SELECT FROM pg_catalog.pg_index i
            JOIN pg_catalog.pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0]
            WHERE i.indrelid = to_regclass('api_keys') AND a.attname = wanted AND i.indpred IS NULL
        ) THEN
            EXECUTE format('CREATE INDEX IF NOT EXISTS %I ON api_keys (%I)', 'ix_api_keys_' || wanted, wanted);
        END IF;
    END LOOP;
END
$$;
