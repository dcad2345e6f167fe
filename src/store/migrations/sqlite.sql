-- The same schema as in Postgres. SQLite has no booleans, JSON or timestamps of its own, and lets any column hold
-- anything: booleans are 0 and 1, JSON is text, timestamps are text in UTC (YYYY-MM-DD HH:MM:SS.ffffff), and a value of
-- another kind makes its key unusable. Everything is IF NOT EXISTS; no column that exists is altered or dropped.

CREATE TABLE IF NOT EXISTS users (
    id INTEGER PRIMARY KEY,
    email TEXT UNIQUE,
    username TEXT UNIQUE,
    hashed_password TEXT NOT NULL,
    is_active BOOLEAN DEFAULT 1,
    is_superuser BOOLEAN DEFAULT 0,
    created_at TEXT DEFAULT (strftime('%Y-%m-%d %H:%M:%f000', 'now')),
    updated_at TEXT DEFAULT (strftime('%Y-%m-%d %H:%M:%f000', 'now')),
    last_login TEXT,
    role TEXT DEFAULT 'user',
    account_locked BOOLEAN DEFAULT 0,
    account_locked_until TEXT
);

CREATE TABLE IF NOT EXISTS api_keys (
    id INTEGER PRIMARY KEY,
    name TEXT,
    key_hash TEXT UNIQUE,
    key_prefix TEXT,
    user_id INTEGER REFERENCES users (id),
    is_active BOOLEAN DEFAULT 1,
    permissions TEXT,
    scopes TEXT,
    rate_limit_per_minute INTEGER,
    rate_limit_per_hour INTEGER,
    rate_limit_per_day INTEGER,
    allowed_models TEXT,
    allowed_endpoints TEXT,
    allowed_ips TEXT,
    allowed_chatbots TEXT,
    allowed_agents TEXT,
    is_unlimited BOOLEAN DEFAULT 0,
    budget_limit_cents INTEGER,
    budget_type TEXT DEFAULT 'total',
    description TEXT,
    tags TEXT,
    created_at TEXT DEFAULT (strftime('%Y-%m-%d %H:%M:%f000', 'now')),
    updated_at TEXT DEFAULT (strftime('%Y-%m-%d %H:%M:%f000', 'now')),
    last_used_at TEXT,
    expires_at TEXT,
    total_requests INTEGER DEFAULT 0,
    total_tokens INTEGER DEFAULT 0,
    total_cost INTEGER DEFAULT 0
);

CREATE INDEX IF NOT EXISTS ix_api_keys_key_prefix ON api_keys (key_prefix);
CREATE INDEX IF NOT EXISTS ix_api_keys_user_id ON api_keys (user_id);

-- Secrets that a rotation replaced and that are good until expires_at, as long as key_hash of their key is the one that
-- replaced them: whoever else changes the key's hash, or takes its id, ends them. They have their key's prefix.
CREATE TABLE IF NOT EXISTS keyward_old_secrets (
    id INTEGER PRIMARY KEY,
    key_id INTEGER NOT NULL,
    key_hash TEXT NOT NULL,
    key_prefix TEXT NOT NULL,
    current_hash TEXT NOT NULL,
    rotated_at TEXT NOT NULL,
    expires_at TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS ix_keyward_old_secrets_key_id ON keyward_old_secrets (key_id);

-- What was changed by command: never a secret or a hash.
CREATE TABLE IF NOT EXISTS keyward_history (
    id INTEGER PRIMARY KEY,
    at TEXT NOT NULL,
    actor TEXT NOT NULL,
    action TEXT NOT NULL,
    key_id INTEGER,
    user_id INTEGER,
    changes TEXT
);
CREATE INDEX IF NOT EXISTS ix_keyward_history_key_id ON keyward_history (key_id);

-- The change feed: triggers count the changes that can change a decision, so that a running sidecar, which sees by
-- PRAGMA data_version that somebody has written, can tell them from its own notes of last uses.
CREATE TABLE IF NOT EXISTS keyward_feed (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    changes INTEGER NOT NULL
);
INSERT OR IGNORE INTO keyward_feed (id, changes) VALUES (1, 0);
